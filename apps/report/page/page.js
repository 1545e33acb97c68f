"use strict";
// Draws the charts, and sorts and filters tables. A chart that cannot be drawn opens its numbers.
(async () => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  for (const [id, spec] of Object.entries(specs)) {
    const place = document.getElementById(id);
    try {
      await window.vegaEmbed(place, spec, { actions: false, renderer: "svg", ast: false });
    } catch (error) {
      place.textContent = "The chart could not be drawn; its numbers are below.";
      place.closest("figure").querySelector("details").open = true;
      console.error(`${id}: ${error}`);
    }
  }
  document.documentElement.dataset.drawn = String(Object.keys(specs).length);
})();

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const value = (cell) => {
    const number = Number.parseFloat(cell.textContent.replaceAll(",", ""));
    return Number.isNaN(number) ? null : number;
  };
  headings.forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [a.cells[column], b.cells[column]];
        const [n, m] = [value(x), value(y)];
        // Cells without a number come last in either order, by their text.
        if (n === null || m === null) {
          if (n === null && m === null) return (down ? -1 : 1) * x.textContent.localeCompare(y.textContent);
          return n === null ? 1 : -1;
        }
        return (down ? -1 : 1) * (n - m);
      });
      body.append(...rows);
    });
  });
}
