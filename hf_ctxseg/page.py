"""A page in the browser on which a model is tried, made with gradio; `scripts/demo_app.py` serves it.

A picture goes through the same `Predictor` as `hf_ctxseg.predict`. Nothing is fetched from elsewhere: no fonts, no
statistics of use.
"""

import html
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .attention import attention_picture
from .inference import Predictor
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .nonlocal_block import NonLocalBlock
from .prediction import Prediction
from .visualization import overlay

SCALES = (0.75, 1.0, 1.25)
_LONGEST_SHOWN = 2048  # pixels of a shown picture's longer edge; attention looks at no more
_KEPT = 3600  # seconds after which a visitor's picture and files are deleted


@dataclass
class Shown:
    """What one visitor looks at: a prediction, the same at the size of the screen, the folder of its mask's file."""

    prediction: Prediction
    picture: Image.Image
    mask: np.ndarray
    folder: Path

    @classmethod
    def of(cls, prediction: Prediction) -> "Shown":
        """Make the copies that are shown."""
        picture = prediction.picture.copy()
        picture.thumbnail((_LONGEST_SHOWN, _LONGEST_SHOWN))
        mask = Image.fromarray(prediction.mask.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
        return cls(prediction, picture, np.asarray(mask), Path(tempfile.mkdtemp(prefix="ctxseg-")))

    def drawn(self, classes: Sequence[int], opacity: float) -> Image.Image:
        """Lay the colours of some classes over the picture."""
        every = overlay(self.picture, self.mask, self.prediction.palette, opacity)
        return Image.composite(every, self.picture, Image.fromarray(np.isin(self.mask, list(classes))))

    def choices(self) -> list[tuple[str, int]]:
        """Name with area, and index, of each class that occurs, the largest first."""
        counts = np.bincount(self.prediction.mask.ravel(), minlength=len(self.prediction.names))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        return [
            (f"{self.prediction.names[index]} · {counts[index] / self.prediction.mask.size:.1%}", index)
            for index in order
        ]

    def legend(self) -> str:
        """The classes with their colours, as HTML."""
        square = "display:inline-block;width:1em;height:1em;margin-right:.4em;vertical-align:-.1em;background:rgb{}"
        rows = (
            f'<span style="white-space:nowrap;margin-right:1.2em"><span style="'
            f'{square.format(self.prediction.palette[index])}"></span>{html.escape(text)}</span>'
            for text, index in self.choices()
        )
        return f"<div>{' '.join(rows)}</div>"

    def mask_file(self, picture: str | Path) -> str:
        """Write the mask at the picture's own size, as an indexed PNG."""
        file = self.folder / f"{Path(picture).stem}_mask.png"
        self.prediction.mask_image.save(file)
        return str(file)

    def forget(self) -> None:
        """Delete the mask's file."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """The page of one model.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.

    Raises:
        ValueError: If the model cannot be read.
        ImportError: If gradio is not installed.
    """

    def __init__(self, model: str | Path | CtxSegForSemanticSegmentation) -> None:
        try:
            import gradio
        except ImportError as error:
            raise ImportError(
                "The page needs gradio, which is not installed: pip install 'hf-ctxseg[page]'."
            ) from error
        self._gradio: Any = gradio
        self.predictor = Predictor(model)
        self.has_attention = any(isinstance(module, NonLocalBlock) for module in self.predictor.model.modules())
        self.title = f"{type(self.predictor.model).__name__} on {self.predictor.model.config.backbone}"
        self.blocks = self._build()

    def serve(self, host: str | None = None, port: int | None = None, **options: Any) -> Any:
        """Serve the page until it is interrupted; see gradio's `launch` for its options."""
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = self._gradio.themes.Base(**fonts)
        return self.blocks.launch(
            server_name=host, server_port=port, theme=theme, ssr_mode=False, footer_links=[], **options
        )

    def _build(self) -> Any:
        gr = self._gradio
        with gr.Blocks(title=self.title, analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as blocks:
            gr.Markdown(f"# {html.escape(self.title)}\n{len(self.predictor.names)} classes. Give a picture.")
            shown = gr.State(None, time_to_live=_KEPT, delete_callback=_forget)
            with gr.Row():
                given = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", elem_id="given"
                )
                given.preprocess = _path  # gradio's own opens the picture, and fails without a sentence
                drawn = gr.Image(
                    interactive=False, label="Classes", elem_id="drawn", buttons=["download", "fullscreen"]
                )
            legend = gr.HTML(elem_id="legend")
            with gr.Row():
                classes = gr.CheckboxGroup([], label="Shown classes", elem_id="classes", scale=3)
                opacity = gr.Slider(0, 1, 0.55, step=0.05, label="Opacity", elem_id="opacity")
            with gr.Row():
                flip = gr.Checkbox(label="Look at the mirrored picture, too", elem_id="flip")
                scales = gr.Checkbox(label=f"Look at scales {', '.join(map(str, SCALES))}", elem_id="scales")
                crf = gr.Checkbox(label="Refine by a DenseCRF", elem_id="crf")
                mask = gr.DownloadButton("Download the mask", interactive=False, elem_id="mask")
            gr.Markdown("Attention: click a pixel of the classes above", visible=self.has_attention)
            attention = gr.Image(
                interactive=False,
                show_label=False,  # it would cover the picture's title
                visible=self.has_attention,
                elem_id="attention",
                buttons=["download", "fullscreen"],
            )
            gr.on(
                [given.change, flip.change, scales.change, crf.change],
                self._segment,
                [shown, given, flip, scales, crf, opacity],
                [shown, drawn, legend, classes, mask, attention],
                trigger_mode="always_last",
            )
            # `input`: what the visitor changes, not what `_segment` sets
            gr.on(
                [classes.input, opacity.input], _redraw, [shown, classes, opacity], drawn, trigger_mode="always_last"
            )
            if self.has_attention:

                def attend(shown: Shown | None, event: gr.SelectData) -> Image.Image | None:  # type: ignore[name-defined]
                    return self._attend(shown, event.index)

                drawn.select(attend, shown, attention)
        return blocks

    def _segment(
        self, before: Shown | None, given: str | None, flip: bool, scales: bool, crf: bool, opacity: float
    ) -> tuple[Any, ...]:
        gr = self._gradio
        nothing = None, None, "", gr.update(choices=[], value=[]), gr.update(value=None, interactive=False), None
        _forget(before)
        if given is None:
            return nothing
        try:
            predictor = Predictor(
                self.predictor.model,
                self.predictor.processor,
                scales=SCALES if scales else (1.0,),
                flip=flip,
                crf="default" if crf else None,
            )
            shown = Shown.of(predictor(given))
            file = shown.mask_file(given)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
            # gr.Error would leave the former picture's classes and mask
            gr.Warning(str(error).replace(given, Path(given).name))
            return nothing
        choices = shown.choices()
        every = [index for _, index in choices]
        return (
            shown,
            shown.drawn(every, opacity),
            shown.legend(),
            gr.update(choices=choices, value=every),
            gr.update(value=file, interactive=True),
            None,
        )

    def _attend(self, shown: Shown | None, place: Sequence[int]) -> Image.Image | None:
        if shown is None:
            return None
        query = min(place[0], shown.picture.width - 1), min(place[1], shown.picture.height - 1)
        try:
            heat = self.predictor.attention(shown.picture, query)
        except RuntimeError as error:  # out of memory
            raise self._gradio.Error(str(error), print_exception=False) from error
        return attention_picture(shown.picture, heat, query)


def _path(given: Any) -> str | None:
    return None if given is None else given.path


def _redraw(shown: Shown | None, classes: Sequence[int], opacity: float) -> Image.Image | None:
    return None if shown is None else shown.drawn(classes, opacity)


def _forget(shown: Shown | None) -> None:
    if shown is not None:
        shown.forget()
