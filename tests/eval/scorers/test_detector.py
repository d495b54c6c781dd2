"""Objects from logits against slow sums, pixel by pixel; colours against CLIP called by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.errors import MissingWeights
from eval.scorers.detector import (
    FLOOR,
    TEMPLATES,
    ColourClassifier,
    Detector,
    Segment,
    box_of,
    cut_out,
    network_size,
    prepared,
    segments,
)
from eval.scorers.geneval import COLOURS, Detection


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((256, 256), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),
        ((300, 900), (444, 1333)),  # the longer side decides
        ((900, 300), (1333, 444)),
    ],
)
def test_network_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert network_size(*shape, 800, 1333) == size


def test_prepared_is_normalised_resized_and_padded_with_zeros() -> None:
    pixels = torch.tensor([255.0, 0.0, 51.0]).view(1, 3, 1, 1).expand(1, 3, 10, 20)
    shown = prepared(pixels, (40, 80))
    assert shown.shape == (1, 3, 64, 96)
    assert shown[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], rel=1e-5
    )
    assert torch.equal(shown[0, 0, :40, :80], shown[0, 0, 0, 0].expand(40, 80))
    assert not shown[:, :, 40:].any()
    assert not shown[:, :, :, 80:].any()


def logits_of(kinds: dict[int, float], queries: int = 3) -> torch.Tensor:
    """(Q, 81): the first query has these probabilities, the others are of no class."""
    logits = torch.full((queries, 81), -30.0)
    logits[:, 80] = 30.0
    rest = 1 - sum(kinds.values())
    logits[0] = -30.0
    logits[0, 80] = float(np.log(rest))
    for kind, probability in kinds.items():
        logits[0, kind] = float(np.log(probability))
    return logits


def test_known_masks_give_exact_boxes_and_scores() -> None:
    """At one size throughout nothing is interpolated: a block of logit 2 over -3."""
    masks = torch.full((3, 32, 64), -3.0)
    masks[0, 5:9, 10:30] = 2.0
    actual = segments(logits_of({17: 0.6, 3: 0.3}), masks, (32, 64), (32, 64), (32, 64))
    inside = 1 / (1 + np.exp(-2))
    assert [(s.kind, s.box) for s in actual] == [(17, (10, 5, 30, 9)), (3, (10, 5, 30, 9))]
    assert [s.score for s in actual] == pytest.approx([0.6 * inside, 0.3 * inside], rel=1e-5)
    assert actual[0].mask.sum() == 80
    assert actual[0].mask[5:9, 10:30].all()


def linear(value: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear at half-pixel centres, edges repeated, a pixel at a time."""
    logits = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = (
                (p + 0.5) * old / new - 0.5
                for p, old, new in ((y, value.shape[0], height), (x, value.shape[1], width))
            )
            v, u = max(v, 0.0), max(u, 0.0)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, value.shape[0] - 1), min(x0 + 1, value.shape[1] - 1)
            top = value[y0, x0] * (1 - (u - x0)) + value[y0, x1] * (u - x0)
            low = value[y1, x0] * (1 - (u - x0)) + value[y1, x1] * (u - x0)
            logits[y, x] = top * (1 - (v - y0)) + low * (v - y0)
    return logits


def test_random_logits_against_slow_sums() -> None:
    random = np.random.default_rng(0)
    classes, masks = random.normal(0, 5, (6, 81)), random.normal(0, 2, (6, 8, 16))
    actual = segments(
        torch.from_numpy(classes), torch.from_numpy(masks), (32, 64), (28, 50), (14, 25)
    )
    odds = np.exp(classes) / np.exp(classes).sum(1, keepdims=True)
    expected = []
    for query in range(6):
        logits = linear(linear(masks[query], 32, 64)[:28, :50], 14, 25)
        mask = logits > 0
        sure = (mask / (1 + np.exp(-logits))).sum() / (mask.sum() + 1e-6)
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        expected += [(odds[query, kind] * sure, kind, box, mask) for kind in range(80)]
    surest = sorted(expected, key=lambda item: -item[0])
    surest = [item for item in surest if item[0] > FLOOR]
    assert len(surest) > 3
    order = sorted(actual, key=lambda s: -s.score)
    assert [(s.kind, s.box) for s in order] == [(kind, box) for _, kind, box, _ in surest]
    assert [s.score for s in order] == pytest.approx([item[0] for item in surest], rel=1e-6)
    assert all(np.array_equal(s.mask, item[3]) for s, item in zip(order, surest, strict=True))


def test_only_the_hundred_surest_pairs_count() -> None:
    """Two hundred queries that are all sure of their class."""
    classes = torch.full((200, 81), -20.0)
    classes[:, 4] = torch.linspace(0, 5, 200)
    masks = torch.full((200, 4, 4), 1.0)
    actual = segments(classes, masks, (4, 4), (4, 4), (4, 4))
    sure = classes.softmax(-1)[:, 4].sort(descending=True).values[:100] / (1 + np.exp(-1))
    assert [s.score for s in actual] == pytest.approx(sure.tolist(), rel=1e-4)


def test_an_empty_mask_is_no_object() -> None:
    masks = torch.full((3, 8, 8), -1.0)
    assert segments(logits_of({17: 0.9}), masks, (32, 32), (32, 32), (8, 8)) == []
    assert box_of(np.zeros((4, 5), bool)) == (0, 0, 0, 0)


def test_nothing_likely_enough_is_no_object() -> None:
    masks = torch.full((3, 8, 8), 5.0)
    assert segments(logits_of({17: FLOOR - 0.01}), masks, (32, 32), (32, 32), (8, 8)) == []


def test_a_real_detector_through_its_own_model(detector_folder: Path) -> None:
    """Pictures of two shapes; each alone and in a batch; masks and boxes at the picture's size."""
    import transformers

    random = np.random.default_rng(1)
    wide = [random.integers(0, 255, (30, 60, 3), dtype=np.uint8) for _ in range(2)]
    detector = Detector(str(detector_folder), "cpu", shortest=64, longest=100)
    actual = detector(wide)
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    for picture, objects in zip(wide, actual, strict=True):
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        small = torch.nn.functional.interpolate(pixels[None], (50, 100), mode="bilinear")[0]
        shown = torch.zeros(3, 64, 128)
        for i, (mean, std) in enumerate(
            zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
        ):
            shown[i, :50, :100] = (small[i] - mean) / std
        with torch.no_grad():
            out = model(pixel_values=shown[None])
        alone = segments(
            out.class_queries_logits[0], out.masks_queries_logits[0], (64, 128), (50, 100), (30, 60)
        )
        assert objects
        assert [(s.kind, s.box) for s in objects] == [(s.kind, s.box) for s in alone]
        assert [s.score for s in objects] == pytest.approx([s.score for s in alone], rel=1e-3)
        assert all(s.mask.shape == (30, 60) for s in objects)


def test_a_cut_out_has_grey_around_it_and_ends_with_the_box() -> None:
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    whole = Image.composite(
        Image.fromarray(picture), Image.new("RGB", (8, 6), "#999"), Image.fromarray(mask)
    )
    cut = cut_out(picture, Segment(0, 1.0, box_of(mask), mask))
    assert cut.shape == (3, 3, 3)
    assert np.array_equal(np.asarray(cut), np.asarray(whole.crop((2.0, 1.0, 5.0, 4.0))))
    assert tuple(cut[1, 1]) == (0x99, 0x99, 0x99)


def test_likeness_to_colours_against_clip_by_hand(clip_folder: Path) -> None:
    import transformers

    random = np.random.default_rng(2)
    picture = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[5:25, 10:45] = random.random((20, 35)) > 0.3
    item = Segment(16, 0.8, box_of(mask), mask)
    actual = ColourClassifier(str(clip_folder), "cpu", COLOURS)(picture, [item, item], "cat")
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    cut = transformers.AutoTokenizer.from_pretrained(clip_folder)
    image = Image.fromarray(cut_out(picture, item))
    width, height = image.size
    image = image.resize((int(28 * width / height), 28), Image.Resampling.BICUBIC)
    left = round((image.width - 28) / 2)
    pixels = np.asarray(image.crop((left, 0, left + 28, 28))) / 255
    shown = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        seen = model.vision_model(torch.from_numpy(shown).float().permute(2, 0, 1)[None])
        look = model.visual_projection(seen.pooler_output)[0].numpy()
        for colour, likeness in zip(COLOURS, actual[0], strict=True):
            texts = []
            for template in TEMPLATES:  # one at a time: nothing is padded
                tokens = cut(template.format(c=colour, o="cat"), return_tensors="pt")
                read = model.text_model(**tokens)
                text = model.text_projection(read.pooler_output)[0].numpy()
                texts.append(text / np.linalg.norm(text))
            mean = np.mean(texts, 0)
            cosine = look @ mean / np.linalg.norm(look) / np.linalg.norm(mean)
            assert likeness == pytest.approx(cosine, abs=1e-5)
    assert len(set(actual[0])) == 10
    assert actual[1] == pytest.approx(actual[0], abs=1e-6)


SHADES = {
    "red": (230, 20, 20), "orange": (250, 130, 0), "yellow": (240, 240, 30), "green": (20, 180, 20),
    "blue": (20, 20, 230), "purple": (130, 0, 160), "pink": (250, 150, 190), "brown": (110, 60, 20),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip


def test_a_clip_that_knows_colours_tells_them(clip_folder: Path, tmp_path: Path) -> None:
    """Its two projections are solved for: a plain square of a colour, and each template's text, go to one axis each."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    cut = transformers.AutoTokenizer.from_pretrained(clip_folder)
    shades = torch.tensor([SHADES[colour] for colour in COLOURS]) / 255
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    plain = ((shades - torch.tensor(mean)) / torch.tensor(std))[..., None, None].expand(
        10, 3, 28, 28
    )
    texts = [template.format(c=c, o="cat") for c in COLOURS for template in TEMPLATES]
    with torch.no_grad():
        looks = model.vision_model(plain).pooler_output
        reads = model.text_model(**cut(texts, padding=True, return_tensors="pt")).pooler_output
        for layer, seen in (
            (model.visual_projection, looks),
            (model.text_projection, reads.view(10, 3, -1).mean(1)),
        ):
            layer.weight.copy_(torch.linalg.pinv(seen.double()).T.float())
    model.save_pretrained(tmp_path)
    cut.save_pretrained(tmp_path)
    ready = ColourClassifier(str(tmp_path), "cpu", COLOURS)
    mask = np.zeros((30, 40), bool)
    mask[4:26, 4:34] = True
    for colour, shade in SHADES.items():
        picture = np.full((30, 40, 3), SHADES["purple" if colour != "purple" else "red"], np.uint8)
        picture[mask] = shade
        likeness = ready(picture, [Segment(16, 0.8, box_of(mask), mask)], "cat")[0]
        assert Detection(box_of(mask), 0.8, likeness).colour == colour


def test_models_that_cannot_serve_are_named(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"nowhere.*hf download"):
        Detector(str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(MissingWeights, match="Mask2FormerForUniversalSegmentation"):
        Detector(str(clip_folder), "cpu")
    with pytest.raises(MissingWeights, match="some/model.*hf download some/model"):
        ColourClassifier("some/model", "cpu", COLOURS)


def test_a_detector_of_other_classes_is_refused(detector_folder: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        detector_folder, num_labels=133, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(MissingWeights, match="found 133 classes, expected COCO's 80"):
        Detector(str(tmp_path), "cpu")
