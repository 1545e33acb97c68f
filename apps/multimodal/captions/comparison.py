"""How captions are compared: by BLEU and chrF++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.equal_cost.comparison import ExampleDifference
from apps.multimodal.captions.metrics import by_image
from apps.multimodal.captions.report import image_name, side_by_side
from apps.nlp.decode.comparison import WritingComparison


class CaptionComparison(WritingComparison):
    """An ``ImageCaptioner`` as a comparison sees it."""

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return each image of the last test, with its caption and its texts."""
        data = self.module._data()
        return [
            {
                "index": image.image,
                "image": image_name(data, image.image),
                "references": list(image.references),
                "caption": image.caption,
            }
            for image in by_image(self.module._tested)
        ]

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return BLEU and chrF++ differences by paired bootstrap resampling of the images."""
        from apps.nlp.text.significance import text_differences

        if [(e["index"], e["references"]) for e in first] != [(e["index"], e["references"]) for e in second]:
            raise ValueError("the two tests are not of the same images")
        captions, others = ([e["caption"] for e in examples] for examples in (first, second))
        references = [e["references"] for e in first]
        return text_differences(captions, others, references, self.module.bleu_tokenize, over="test images")

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return images at equal steps through the test set, with each system's caption."""
        return side_by_side(systems, 0 if self.module.report is None else self.module.report.samples)


COMPARISON = CaptionComparison
