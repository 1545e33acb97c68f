"""An app's exhibit as a page of Gradio's: the user's input on one side, the answer and its experts on the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from apps.base.messages import message, one_line
from apps.cli.errors import describe
from apps.demonstrate.drawing import draw_parts, problem
from apps.report.exhibit import Answer, ChoiceField, Exhibit, Field, ImageField, ItemsField, NumberField, TextField

log = logging.getLogger(__name__)

_MOST_CHOICES = 5000
"""Values up to which a field is a list to choose from; of more, one is typed."""
_MANY_FIELDS = 4
"""Fields from which they are side by side."""
_BLUE, _DARKER = "#0060a0", "#004d80"
_FORGET_AFTER = (600, 3600)
"""Seconds between two looks at uploaded files, and their age from which they are deleted; at the end all are."""
_LAYER = "Experts of layer"
_WAITING = "<p>The answer stands here.</p>"
_DENSE = "<p>This model is dense: there are no experts to show.</p>"


@cache
def appearance() -> dict[str, Any]:
    """Return theme and style of the page, whose fonts are the machine's own."""
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gradio.themes.Default(primary_hue="blue", **fonts)
    for dark in ("", "_dark"):  # the theme's own have too little contrast
        theme.set(**{f"button_primary_background_fill{dark}": _BLUE, f"button_primary_text_color{dark}": "white"})
        theme.set(**{f"button_primary_background_fill_hover{dark}": _DARKER})
    return {"theme": theme, "css": Path(__file__).with_name("page.css").read_text("utf-8")}


def build_page(exhibit: Exhibit, name: str, folder: Path) -> Any:
    """Return the page of an exhibit, ``gradio.Blocks``.

    Args:
        exhibit: its parts.
        name: name of the run, for its heading.
        folder: an empty folder, for the images of the examples; it has to stay as long as the page.
    """
    import gradio as gr

    examples = _example_values(exhibit, folder)
    first = examples[0] if examples else None
    shown, by_layer = (_shown(_WAITING), {}) if first is None else _answer(exhibit, first)
    names, title = list(by_layer), f"{name} - moesaic demo"
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=_FORGET_AFTER) as page:
        gr.HTML(_shown(Markup("<h1>{}</h1><p>{}</p>").format(name, exhibit.about)))
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                side_by_side = len(exhibit.fields) >= _MANY_FIELDS
                with gr.Row(elem_classes=["fields"]) if side_by_side else gr.Group():
                    start = [_start(field) for field in exhibit.fields] if first is None else first
                    fields = [_component(*both) for both in zip(exhibit.fields, start, strict=True)]
                button = gr.Button(exhibit.action, variant="primary")
                buttons = _example_buttons(exhibit, examples)
            with gr.Column(scale=6, min_width=320):
                answer = gr.HTML(shown, elem_id="answer")
                last = names[-1] if names else None
                layer = gr.Radio(names, value=last, label=_LAYER, visible=bool(names), elem_id="layer")
                experts = gr.HTML(by_layer.get(last or "", ""), visible=bool(names), elem_id="experts")
        layers = gr.State(by_layer)
        outputs = [answer, layer, experts, layers]

        def answered(chosen: str | None, *raw: Any) -> Iterator[list[Any]]:
            """Yield the outputs for the values in the fields, each time the answer grows."""
            for shown, by_layer in _growing(exhibit, raw):
                if by_layer is None:
                    yield [shown, *[gr.skip()] * 3]
                    continue
                last = chosen if chosen in by_layer else next(reversed(by_layer), None)
                choices = gr.update(choices=list(by_layer), value=last, visible=bool(by_layer))
                yield [shown, choices, gr.update(value=by_layer.get(last or ""), visible=bool(by_layer)), by_layer]

        def show(chosen: str | None, by_layer: dict[str, str]) -> Any:
            return by_layer.get(chosen or "", "")

        private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": [answer]}
        button.click(answered, [layer, *fields], outputs, **private)
        for field, component in zip(exhibit.fields, fields, strict=True):
            if isinstance(field, TextField | NumberField):
                component.submit(answered, [layer, *fields], outputs, **private)
        layer.input(show, [layer, layers], experts, **private)
        for example, values in zip(buttons, examples, strict=True):

            def take(chosen: str | None, values: Sequence[Any] = values) -> Iterator[list[Any]]:
                yield from ([*values, *outputs] for outputs in answered(chosen, *values))

            example.click(take, layer, [*fields, *outputs], **private)
    return page


def _shown(html: str, grows: bool = False) -> str:
    return f'<div class="shown{" growing" * grows}">{html}</div>'


def _growing(exhibit: Exhibit, raw: Sequence[Any]) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yield the HTML of an answer each time it grows, with None; at the end, what ``_answer`` returns."""
    if not exhibit.grows:
        yield _answer(exhibit, raw)
        return
    told, gone = queue.SimpleQueue[tuple[str, dict[str, str] | None]](), threading.Event()

    def tell(part: Any) -> None:
        if gone.is_set():
            raise ValueError("nobody reads the answer any more")
        told.put((_shown(draw_parts((part,)), grows=True), None))

    threading.Thread(target=lambda: told.put(_answer(exhibit, raw, tell)), daemon=True).start()
    try:
        by_layer = None
        while by_layer is None:
            shown, by_layer = told.get()
            yield shown, by_layer
    finally:
        gone.set()


def _answer(exhibit: Exhibit, raw: Sequence[Any], *tell: Callable[[Any], None]) -> tuple[str, dict[str, str]]:
    """Return the HTML of an answer, and of the experts by layer; of wrong input one line."""
    try:
        values = [field.read(own) for field, own in zip(exhibit.fields, raw, strict=True)]
        answer: Answer = exhibit.answer(values, *tell)
    except ValueError as error:
        return _shown(problem(one_line(message(error)))), {}
    except Exception as error:  # a fault of ours: the page says so, and the terminal where
        log.exception("the demo could not answer")
        return _shown(problem(describe(error)[0])), {}
    by_layer = {name: _shown(draw_parts(parts)) for name, parts in answer.layers.items()}
    return _shown(draw_parts(answer.parts) + ("" if by_layer else _DENSE)), by_layer


# ---- fields


def _start(field: Field) -> Any:
    """Return the initial value of a field."""
    if isinstance(field, ImageField):
        return None
    if isinstance(field, NumberField):
        return "" if field.value is None else f"{field.value:.7g}"
    if isinstance(field, ItemsField):
        return _standing(field, field.value)
    return field.value or ""


def _standing(field: Field, value: Any) -> Any:
    """Convert an exhibit's value to its field's component: many items are typed, one per line."""
    if isinstance(field, ItemsField):
        return "\n".join(value) if _is_typed(field) else list(value)
    return value


def _is_typed(field: ItemsField | ChoiceField) -> bool:
    return len(field.names if isinstance(field, ItemsField) else field.choices) > _MOST_CHOICES


def _component(field: Field, value: Any) -> Any:
    """Return the component of a field, with a value in it."""
    import gradio as gr

    if isinstance(field, ImageField):
        kind: dict[str, Any] = {"type": "filepath", "image_mode": None, "format": "png", "elem_classes": ["picture"]}
        component = gr.Image(value, label=field.label, sources=["upload", "clipboard"], height=240, **kind)
        # The file goes to the app as it is: its own reader reports an error in one line.
        component.preprocess = lambda payload: None if payload is None else payload.path
        return component
    if isinstance(field, TextField):
        return gr.Textbox(value, label=field.label, lines=field.lines)
    if isinstance(field, ItemsField):
        if _is_typed(field):
            return gr.Textbox(value, label=f"{field.label}, one a line", lines=6)
        names = list(field.names)
        return gr.Dropdown(names, value=value, label=field.label, multiselect=True, allow_custom_value=True)
    if isinstance(field, NumberField) or _is_typed(field):
        return gr.Textbox(value, label=field.label, lines=1, max_lines=1)
    choices = ["", *field.choices] if field.may_be_empty else list(field.choices)
    return gr.Dropdown(choices, value=value, label=field.label, allow_custom_value=True)


# ---- examples


def _example_values(exhibit: Exhibit, folder: Path) -> list[list[Any]]:
    """Return the values of the fields after a click on each example; an image is a file of the folder then."""
    from PIL import Image

    values = [[*example.values] for example in exhibit.examples]
    for number, own in enumerate(values):
        for i, field in enumerate(exhibit.fields):
            if isinstance(field, ImageField):
                path = folder / f"{number}.png"
                Image.fromarray(own[i]).save(path)
                own[i] = str(path)
            own[i] = _standing(field, own[i])
    return values


def _example_buttons(exhibit: Exhibit, values: Sequence[Sequence[Any]]) -> list[Any]:
    """Return a button for each example; an image is shown on it."""
    import gradio as gr

    if not values:
        return []
    gr.HTML(_shown('<p class="title">Examples</p>'))
    image = next((i for i, field in enumerate(exhibit.fields) if isinstance(field, ImageField)), None)
    icons = [None if image is None else own[image] for own in values]
    with gr.Row(elem_classes=["examples"]):
        pairs = zip(exhibit.examples, icons, strict=True)
        return [gr.Button(own.label, icon=icon, size="sm", min_width=40) for own, icon in pairs]
