// The index of runs: rows that match the search, and with "only those chosen" are ticked.
{
  const list = document.getElementById("list");
  const [search, only, count] = ["search", "only", "count"].map((id) => document.getElementById(id));
  const show = () => {
    const wanted = search.value.toLowerCase();
    const rows = [...list.tBodies[0].rows];
    for (const row of rows) {
      const chosen = !only.checked || row.querySelector(".choice").checked;
      row.hidden = !(chosen && row.textContent.toLowerCase().includes(wanted));
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  for (const control of [search, only, list]) control.addEventListener("input", show);
  show();
}

// A point for each model, by the two figures that the reader chooses. Vega would make the file 0.9 MB larger.
const svg = document.getElementById("choice");
if (svg) {
  const points = JSON.parse(document.getElementById("points").textContent);
  const [up, across] = ["up", "across"].map((id) => document.getElementById(id));
  const [height, left, right, top, bottom] = [280, 72, 16, 12, 28];
  const add = (parent, name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };
  // Returns a few round numbers of the axis, and the place of a value between two places.
  const axis = (values, from, to) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = 0.08 * (high - low || Math.abs(high) || 1);
    const [first, last] = [low - room, high + room];
    const power = 10 ** Math.floor(Math.log10((last - first) / 4));
    const step = [1, 2, 5, 10].map((n) => n * power).find((size) => (last - first) / size <= 6);
    const ticks = [];
    for (let n = Math.ceil(first / step); n * step <= last; n += 1) ticks.push(n * step);
    return { ticks, at: (value) => from + ((value - first) / (last - first)) * (to - from) };
  };
  const shown = (value) => Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 });
  const draw = () => {
    const width = svg.clientWidth;
    const known = points.filter(([, figures]) => up.value in figures && across.value in figures);
    svg.replaceChildren();
    if (!known.length) return;
    const x = axis(known.map(([, figures]) => figures[across.value]), left, width - right);
    const y = axis(known.map(([, figures]) => figures[up.value]), height - bottom, top);
    for (const tick of x.ticks) {
      add(svg, "line", { x1: x.at(tick), x2: x.at(tick), y1: top, y2: height - bottom });
      add(svg, "text", { x: x.at(tick), y: height - 8, "text-anchor": "middle" }, shown(tick));
    }
    for (const tick of y.ticks) {
      add(svg, "line", { x1: left, x2: width - right, y1: y.at(tick), y2: y.at(tick) });
      add(svg, "text", { x: left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, shown(tick));
    }
    for (const [name, figures] of known) {
      const circle = add(svg, "circle", { cx: x.at(figures[across.value]), cy: y.at(figures[up.value]), r: 5 });
      add(circle, "title", {}, `${name}: ${shown(figures[up.value])} at ${shown(figures[across.value])}`);
    }
  };
  for (const control of [up, across]) control.addEventListener("input", draw);
  window.addEventListener("resize", draw);
  draw();
}
