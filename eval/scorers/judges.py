"""Scorers with models that look at pictures: `python -m eval score geneval|dpg|genai|softtifa SAVE_DIR ...`

    questions and models are read and checked -> pictures -> findings (kept as they come) -> items -> scores

What decides is in `eval.scorers.geneval`, `.dpg`, `.genai` and `.geneval2`, what looks in
`eval.scorers.detector` and `eval.scorers.vlm`. A score is named after the model that looked, since
it compares with no other.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards import atomic_write, canonical_json, sha256
from shards.places import local_path, model

from ..features.pretrained import label
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..scores.aggregate import aggregate, pooled
from ..scores.results import NAME, Item, Score, Value
from ..scores.scorer import Scored, Scorer
from . import dpg, genai, geneval
from . import geneval2 as softtifa
from .predictions import cached_predictions

if TYPE_CHECKING:
    from .detector import Colours, Detector
    from .vlm import Spellings, Vlm

Json = dict[str, Any]
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
VLM = "Qwen/Qwen3-VL-8B-Instruct"  # of the family that t2v_metrics 3.1 asks
# where `python -m eval prompts fetch` puts them
QUESTIONS = Path("prompts/dpgbench/dpg_bench.csv")
SKILLS = Path("prompts/genaibench/genai_skills.json")
UNCALIBRATED = "uncalibrated until compared with the official scorer"
GATED = "categories are gated too; those that the official script prints are dpg-ungated's"
PACKAGES = ("torch", "transformers", "pillow")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, at least 1")
    return int(text)


# GenEval -------------------------------------------------------------------------------------------


def _geneval_flags(add: argparse.ArgumentParser) -> None:
    """GenEval: objects by Mask2Former, colours by CLIP"""
    add.add_argument(
        "--detector",
        type=model,
        default=DETECTOR,
        help="Mask2Former for COCO instances: hub name or folder",
    )
    add.add_argument(
        "--clip", type=model, default=CLIP, help="CLIP for colours: hub name or folder"
    )
    add.add_argument("--batch_size", type=_count, default=8, help="pictures")


def _geneval_ready(args: argparse.Namespace) -> None:
    _lookers(args)


def _geneval(images: ImageSetReader, args: argparse.Namespace) -> Scored:
    notes = (UNCALIBRATED, *geneval.check(images.prompts))
    detector, colours = _lookers(args)
    records = [prompt.record for prompt in images.prompts.items]
    key = {
        "detector": detector.identity, "colours": colours.identity, "batch_size": args.batch_size,
        "records": sha256(canonical_json(records)),
    }  # fmt: skip

    def find(ones: Sequence[PictureRef], pictures: Sequence[Picture]) -> list[Json]:
        found: list[Json] = []
        for _, same in groupby(zip(ones, pictures, strict=True), lambda pair: pair[1].shape):
            some, shown = zip(*same, strict=True)
            for one, picture, objects in zip(some, shown, detector(shown), strict=True):
                wanted = geneval.looked_at(one.file.prompt.record or {})
                found.append(geneval.to_json(_coloured(picture, objects, wanted, colours)))
        return found

    about = f"geneval-hf-{label(args.detector)}"
    seen = cached_predictions(images, about, key, args.batch_size, find, rank=Rank.here())
    if seen is None:
        return
    items, lines = [], []
    for one, stored in seen.found:
        record, objects = one.file.prompt.record or {}, geneval.from_json(stored)
        items.append(geneval.item(one.file.prompt.id, one.number, record, objects))
        lines.append(geneval.official(str(one.path), record, objects))
    made_by = key | {
        "paths": [args.detector, args.clip], "rules": asdict(geneval.Rules()), "summary": geneval.summary(items),
    }  # fmt: skip
    scored = _Scored(images, made_by, notes, seen.seconds)
    score = scored.score(about, items, aggregate(items, overall="groups"), overall="groups")
    official = images.folder / NAME / f"{score.scorer}.results.jsonl"
    atomic_write(official, b"".join(map(canonical_json, lines)))
    yield score, items


def _lookers(args: argparse.Namespace) -> "tuple[Detector, Colours]":
    device = Rank.here().device(args.device)
    return _detector(args.detector, device), _colours(args.clip, device)


def _coloured(
    picture: Picture, found: Sequence[Any], wanted: dict[str, int], colours: "Colours"
) -> geneval.Objects:
    """Segments by class, the surest first; those whose colours are asked for with their likeness."""
    objects: geneval.Objects = {}
    ordered = sorted(found, key=lambda segment: -segment.score)
    for kind in sorted({segment.kind for segment in found}):
        name = geneval.CLASSES[kind]
        mine = [segment for segment in ordered if segment.kind == kind]
        looked = mine[: wanted.get(name, 0)]
        likeness = colours(picture, looked, name) if looked else []
        likeness += [()] * (len(mine) - len(looked))
        objects[name] = [
            geneval.Detection(s.box, s.score, like) for s, like in zip(mine, likeness, strict=True)
        ]
    return objects


# DPG-Bench -----------------------------------------------------------------------------------------


def _vlm_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--vlm", type=model, default=VLM, help="a model for pictures and text: hub name or folder"
    )
    add.add_argument("--batch_size", type=_count, default=8, help="questions at a time")


def _dpg_flags(add: argparse.ArgumentParser) -> None:
    """DPG-Bench: the official questions, answered by a model of your choice"""
    _vlm_flags(add)
    add.add_argument("--csv", type=local_path, default=QUESTIONS, help="the official questions")


def _dpg_ready(args: argparse.Namespace) -> None:
    from .vlm import ANY

    dpg.read_questions(args.csv)
    _asked(args, ANY)


def _dpg(images: ImageSetReader, args: argparse.Namespace) -> Scored:
    questions = dpg.read_questions(args.csv)
    absent = dpg.absent(questions, images.prompts, args.partial)
    from .vlm import ANY

    vlm = _asked(args, ANY)
    key = {"vlm": vlm.identity, "prompt": dpg.PROMPT, "questions": dpg.digest(questions)}

    def find(ones: Sequence[PictureRef], pictures: Sequence[Picture]) -> list[Json]:
        pairs = zip(ones, pictures, strict=True)
        return [_answers(vlm, shown, questions[one.file.prompt.id]) for one, shown in pairs]

    about = label(args.vlm)
    seen = cached_predictions(images, f"dpg-{about}", key, 1, find, rank=Rank.here())
    if seen is None:
        return
    gated = [
        dpg.item(one.file.prompt.id, one.number, questions[one.file.prompt.id], odds)
        for one, odds in seen.found
    ]
    made_by = key | {"paths": [args.vlm], "whole_questions": dpg.whole_digest(questions)}
    for name, items, field, notes in (
        (f"dpg-{about}", gated, "gated", (GATED,)),
        (f"dpg-ungated-{about}", [dpg.ungated(item) for item in gated], "answer", ()),
    ):
        values = aggregate(items, unit=100)[0], pooled(dpg.by_category(items, field), unit=100)
        scored = _Scored(images, made_by, notes, seen.seconds, absent)
        yield scored.score(name, items, values, unit=100), items


def _answers(vlm: "Vlm", picture: Picture, questions: Sequence[dpg.Question]) -> Json:
    odds = vlm.answers(picture, [dpg.PROMPT.format(q.text) for q in questions])
    return {
        str(q.number): [answer.yes, answer.no] for q, answer in zip(questions, odds, strict=True)
    }


# GenAI-Bench ---------------------------------------------------------------------------------------


def _genai_flags(add: argparse.ArgumentParser) -> None:
    """GenAI-Bench: VQAScore by a model of your choice"""
    _vlm_flags(add)
    add.add_argument("--skills", type=local_path, help="the official skills; fetched ones without")


def _genai_ready(args: argparse.Namespace) -> None:
    from .vlm import EXACT

    if args.skills or not any(SKILLS.parents[1].glob(f"genaibench*/{SKILLS.name}")):
        genai.read(args.skills or SKILLS)
    _asked(args, EXACT)


def _genai(images: ImageSetReader, args: argparse.Namespace) -> Scored:
    path = args.skills or SKILLS.parents[1] / images.prompts.benchmark / SKILLS.name
    skills, absent = genai.read_skills(path, images.prompts, args.partial)
    from .vlm import EXACT

    vlm = _asked(args, EXACT)
    key = {"vlm": vlm.identity, "prompt": genai.QUESTION, "prompts": images.prompts.digest}

    def find(ones: Sequence[PictureRef], pictures: Sequence[Picture]) -> list[Json]:
        asked = [genai.QUESTION.format(one.file.prompt.text) for one in ones]
        odds = vlm.ask(list(zip(pictures, asked, strict=True)))
        return [{"yes": answer.yes, "no": answer.no} for answer in odds]

    about = f"genai-vqascore-{label(args.vlm)}"

    def counts(one: PictureRef) -> bool:
        return one.file.prompt.id in skills

    seen = cached_predictions(images, about, key, args.batch_size, find, counts, Rank.here())
    if seen is None:
        return
    items = [
        genai.item(one.file.prompt.id, one.number, skills[one.file.prompt.id], **odds)
        for one, odds in seen.found
    ]
    made_by = key | {"paths": [args.vlm], "skills": sha256(canonical_json(skills))}
    notes = genai.check(skills, images.prompts)
    scored = _Scored(images, made_by, notes, seen.seconds, absent)
    yield scored.score(about, items, aggregate(items)), items


# GenEval 2 -----------------------------------------------------------------------------------------


def _softtifa_flags(add: argparse.ArgumentParser) -> None:
    """GenEval 2's Soft-TIFA: its questions, answered by a model of your choice"""
    _vlm_flags(add)
    add.add_argument(
        "--questions",
        type=local_path,
        default=Path("geneval2_data.jsonl"),
        help="the official questions",
    )


def _softtifa_ready(args: argparse.Namespace) -> None:
    from .vlm import ANY

    softtifa.read_questions(args.questions)
    _asked(args, ANY)


def _softtifa(images: ImageSetReader, args: argparse.Namespace) -> Scored:
    questions = softtifa.read_questions(args.questions)
    absent = softtifa.absent(questions, images.prompts, args.partial)
    from .vlm import ANY

    vlm = _asked(args, ANY)
    key = {"vlm": vlm.identity, "prompt": softtifa.PROMPT, "questions": softtifa.digest(questions)}

    def find(ones: Sequence[PictureRef], pictures: Sequence[Picture]) -> list[Json]:
        found = []
        for one, picture in zip(ones, pictures, strict=True):
            asked = questions[one.file.prompt.text].questions
            pairs = [(picture, softtifa.PROMPT.format(question)) for question, _ in asked]
            odds = vlm.odds(pairs, [softtifa.spellings(answer) for _, answer in asked])
            found.append({"odds": odds})
        return found

    about = label(args.vlm)
    seen = cached_predictions(images, f"geneval2-{about}", key, 1, find, rank=Rank.here())
    if seen is None:
        return
    means = [
        softtifa.items(
            one.file.prompt.id, one.number, questions[one.file.prompt.text], told["odds"]
        )
        for one, told in seen.found
    ]
    made_by = key | {"paths": [args.vlm], "whole_questions": softtifa.whole_digest(questions)}
    scored = _Scored(images, made_by, (), seen.seconds, absent)
    arithmetic, geometric = ([pair[i] for pair in means] for i in (0, 1))
    skills = pooled(softtifa.by_skill(arithmetic), unit=100)
    for name, items, groups in (("am", arithmetic, skills), ("gm", geometric, {})):
        value, atoms = aggregate(items, unit=100)
        values = (value, atoms | groups)
        yield scored.score(f"geneval2-softtifa-{name}-{about}", items, values, unit=100), items


# All -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # of several sets, the models are loaded for the first
def _detector(path: str, device: str) -> "Detector":
    from .detector import Detector

    return Detector(path, device)


@lru_cache(maxsize=1)
def _colours(path: str, device: str) -> "Colours":
    from .detector import Colours

    return Colours(path, device)


@lru_cache(maxsize=1)
def _vlm(path: str, device: str, spellings: "Spellings", batch_size: int) -> "Vlm":
    from .vlm import Vlm

    return Vlm(path, device, spellings, batch_size)


def _asked(args: argparse.Namespace, spellings: "Spellings") -> "Vlm":
    return _vlm(args.vlm, Rank.here().device(args.device), spellings, args.batch_size)


@dataclass(frozen=True)
class _Scored:
    """What the scores of one pass have in common."""

    images: ImageSetReader
    made_by: Json
    notes: tuple[str, ...]
    seconds: float
    absent: int = 0  # prompts of the benchmark that the set does not have

    def score(
        self, name: str, items: Sequence[Item], values: tuple[Value, dict[str, Value]], overall: str = "prompts",
        unit: float = 1.0,
    ) -> Score:  # fmt: skip
        each = int(self.images.settings["images_per_prompt"])
        tiles = len(self.images.files[0].numbers)
        missing = self.images.missing * tiles + self.absent * each
        versions = {package: version(package) for package in PACKAGES}
        return Score(
            scorer=f"{name}-partial-{len(items)}-of-{len(items) + missing}" if missing else name,
            benchmark=self.images.prompts.benchmark, value=values[0], better="higher", groups=values[1],
            overall=overall, unit=unit, prompts=len({item.prompt for item in items}), pictures=len(items),
            missing=missing, notes=self.notes, images=self.images.digest, prompt_list=self.images.prompts.digest,
            made_by=self.made_by | {"versions": versions}, seconds=self.seconds,
        )  # fmt: skip


JUDGES: dict[str, Scorer] = {
    "geneval": Scorer(_geneval_flags, _geneval, _geneval_ready),
    "dpg": Scorer(_dpg_flags, _dpg, _dpg_ready),
    "genai": Scorer(_genai_flags, _genai, _genai_ready),
    "softtifa": Scorer(_softtifa_flags, _softtifa, _softtifa_ready),
}
