"""What a user can get wrong in a study, found before anything expensive; and whether two trainings
differ in what the YAML says and in nothing else, by their own records.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs import ConfigError, did_you_mean
from train.checkpoints.checkpoint import CheckpointError, manifest_of
from train.checkpoints.identity import PARTS, compared, leaves, training_of
from train.model import DiTConfig, FlowConfig
from train.run import initial_model, model_config, refuse_narrow, with_sizes

from ..errors import BadRequest, BadStudy, NotPaired
from ..images.checks import read_manifest
from ..images.ranks import chosen_device
from ..prompts.prompts import LEAST_HALVED
from .earlier import refuse_changed, take_over
from .encoders import check_classes, check_decoders, check_encoders, places
from .flags import generate_settings, scorer_settings
from .graph import Node, nodes_of
from .pictures import prompts_of
from .reuse import FROM_ENCODER, Existing, column_exists
from .study import Study

Json = dict[str, Any]
Differing = Mapping[str, tuple[Any, Any]]
PATCH = ("model.patch_size", "model.pos_embed_max_size", "model.sample_size", "tokens")
# What of a training may differ where a key of its config does, if it is not the key itself. What
# follows from another VAE is told apart by `compared`.
FOLLOWING = {
    "data.caption_dropout": ("caption_dropout",),
    "data.encoder": ("data.text_encoder",),
    "data.hidden_state": ("data.text_encoder",),
    "data.lanes": ("order.lanes",),
    "data.root": ("data", "order"),
    "data.sources": ("data", "order"),
    "data.text": ("data", "model.text_width"),
    "data.truncated": ("data", "order.valid_rows"),
    "data.weights": ("data.weights", "order"),
    "data.window": ("order.window",),
    "global_batch": ("global_batch", "position"),
    "init_ema": ("init",),
    "init_from": ("init",),
    "model.image_tokens": PATCH,
    "model.patch_size": PATCH,
    "optim.schedule": ("optim.schedule", "steps_planned"),
    "steps": ("steps_planned", "step", "position", "init.step", "init.sha256"),
}
# of a model's config: what weights do not have, and what its columns say
NOT_OF_WEIGHTS = {"image_tokens", "initializer_range"}
FROM_COLUMNS = {"in_channels": "channels of the latents", "text_width": "values of a text token"}
# names of the settings of a set
SETTINGS = {
    *("batch_size", "benchmark", "decoding", "ema", "encoding", "guidance_interval"),
    *("guidance_scale", "images_per_prompt", "layout", "norm", "num_inference_steps", "precision"),
    *("prompts", "resolution", "sampler", "seed", "shift", "step", "text", "text_encoder"),
    *("threads", "type", "vae", "weights"),
}
# settings of a set that belong to its VAE and its weights
OF_VAE = {"vae", "decoding", "norm", "weights"}
OF_TEXT = {"text", "text_encoder"}


def preflight(study: Study) -> Study:
    """Returns the study with what it takes over, once nothing is found that would end it later.

    Raises BadStudy, StudyChanged, NotPaired, NoSpace, BadPrompts, ModelNotUsable, ConfigError, or the
    error of a column.
    """
    check_out(study)
    generate_settings(study)
    for scorer in study.scorers:
        scorer_settings(study, scorer)
    check_settled(study, len(prompts_of(study).items))
    check_batches(study)
    check_initial(study)
    existing = Existing(study)
    check_columns(study, existing)
    check_reconstructions(study)
    refuse_changed(study)
    study = take_over(study)
    existing = Existing(study)
    missing = [node for node in nodes_of(study) if not existing.done(node)]
    check_room(study, missing)
    if any(node.kind == "generate" for node in missing):
        check_decoders(study)
        check_sampling_device(study)
    if any(node.kind == "score" for node in missing):
        check_scorers(study)
    return study


def check_settled(study: Study, prompts: int) -> None:
    """Raises BadStudy where settings cannot be chosen: for want of prompts to divide, or of a validation."""
    if study.halved and prompts < LEAST_HALVED:
        raise BadStudy(
            f"{study.path}: settle: found {prompts} prompts, expected at least {LEAST_HALVED}: settings are chosen on "
            "one half and reported on the other. Take more prompts, or say settle: null"
        )
    for name in study.trainings if "lr" in study.axes else ():
        if study.train_config(name, study.seeds[0]).validation.source is None:
            raise BadStudy(
                f"{study.path}: settle.lr: found no validation.source in the training config of {name}, expected the "
                "held-out source whose loss chooses. Set it, or leave lr out"
            )


def check_out(study: Study) -> None:
    """Raises BadStudy where nothing can be written to a study's folder."""
    nearest = next(
        path for path in (study.out.absolute(), *study.out.absolute().parents) if path.exists()
    )
    if not nearest.is_dir():
        raise BadStudy(
            f"{nearest}: found a file, expected a folder for the study. Name another --out"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadStudy(
            f"{nearest}: nothing can be written there. Name another --out, or get the right to it"
        )


def check_ranks(study: Study, gpus: int) -> None:
    """Raises BadStudy where a command would have fewer GPUs than processes, each of which takes one."""
    each = max(1, gpus // study.jobs)
    if gpus and study.ranks > each:
        raise BadStudy(
            f"{study.path}: ranks: found {study.ranks}, expected at most {each}: {gpus} GPUs are visible, for "
            f"{study.jobs} commands at a time. Lower ranks or --jobs, or leave ranks out"
        )


def check_batches(study: Study) -> None:
    """Raises ConfigError where a batch cannot be cut for the processes of a training."""
    for entry in study.entries:
        for phase in range(len(study.parts(entry))):
            try:
                study.train_config(entry, study.seeds[0], phase).accumulation(study.ranks)
            except ConfigError as error:
                raise ConfigError(f"{study.path}: {entry}: {error}") from None


def check_initial(study: Study) -> None:
    """Raises BadStudy where the weights that a first phase starts from are not there."""
    for entry in study.entries:
        try:
            initial_model(study.train_config(entry, study.seeds[0], 0))
        except CheckpointError as error:
            raise BadStudy(f"{study.path}: {entry}: {error}") from None


def check_columns(study: Study, existing: Existing) -> None:
    """Raises an error where columns are missing that no encoder makes, do not join, or make trainings
    that differ in more than the YAML says.
    """
    encoded = {column for _, columns in study.encode_configs.values() for column in columns}
    for entry in study.entries:
        for phase in range(len(study.parts(entry))):
            data = study.train_config(entry, study.seeds[0], phase).data.resolved()
            for column in places([data.latents, data.text, data.also]):
                if column not in encoded and not column_exists(column):
                    raise BadStudy(
                        f"{study.path}: {entry}: found no complete column at {column}. Encode it first; or, "
                        "if it is of latents, give the entry its `encoder` and `resolution`"
                    )
            training = existing.training(entry, study.seeds[0], phase)  # joins them
            if training is not None:
                check_width(study, entry, training)
            else:
                check_expected(study, entry, phase)
        check_phases(study, entry, existing)
    check_encoders(study)
    check_classes(study)
    check_differ(study, existing)
    for entry in study.entries[1:]:
        for phase, base_phase in aligned(study, entry):
            sides = study.baseline, base_phase, entry, phase
            a = existing.training(study.baseline, study.seeds[0], base_phase)
            b = existing.training(entry, study.seeds[0], phase)
            if a is not None and b is not None:
                refuse_unpaired(study, sides, a, b)


def check_reconstructions(study: Study) -> None:
    """Raises BadStudy where a folder of `panel.reconstructions` is absent. Of columns that are still to be made
    there can be none yet.
    """
    folders = study.config.panel.reconstructions if study.config.panel else {}
    for entry, folder in folders.items():
        latents = study.train_config(entry, study.seeds[0]).data.resolved().latents
        if not folder.is_dir() and all(map(column_exists, places(latents))):
            raise BadStudy(
                f"{study.path}: panel.reconstructions.{entry}: found no folder {folder}, expected one that `python -m "
                "eval reconstruct` made. Make it, correct the path, or leave it out"
            )


def check_differ(study: Study, existing: Existing) -> None:
    """Raises BadStudy where `differ` names no part of a training and no setting of a set. Of columns
    that are still to be made, the first word of a part alone is looked at.
    """
    seed = study.seeds[0]
    phases = [(entry, n) for entry in study.entries for n in range(len(study.parts(entry)))]
    trainings = [existing.training(entry, seed, phase) for entry, phase in phases]
    known = {*FROM_ENCODER, *SETTINGS, *PARTS}.union(*FOLLOWING.values())
    known |= set().union(*(leaves(training or {}) for training in trainings))
    known |= {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for key in study.config.differ:
        part = key.partition(".")[0]
        unknown = any(training is None or part not in training for training in trainings)
        if key not in known and not (part in PARTS and unknown):
            raise BadStudy(
                f"{study.path}: differ: found {key}, expected a part of a training, such as optim.lr, or a setting of "
                f"a set of pictures{did_you_mean(key, sorted(known), '')}"
            )


def check_width(study: Study, entry: str, training: Json) -> None:
    """Raises ConfigError where the trainer would refuse the model, since its tokens have more values
    than it is wide."""
    model = DiTConfig.model_validate({"text_width": 1} | training["model"])
    try:
        refuse_narrow(model, FlowConfig.model_validate(training["flow"]))
    except ConfigError as error:
        raise ConfigError(f"{study.path}: {entry}: {error}") from None


def check_expected(study: Study, entry: str, phase: int) -> None:
    """Raises ConfigError where no model fits the latents that `data.expect` says, of columns that are
    still to be made."""
    config = study.train_config(entry, study.seeds[0], phase)
    if (shape := config.data.expect) is None or config.init_from is not None:
        return
    try:
        flow = with_sizes(config, shape).flow
        refuse_narrow(model_config(config, shape), flow)
    except ConfigError as error:
        raise ConfigError(f"{study.path}: {entry}: {error}") from None


def check_phases(study: Study, entry: str, existing: Existing) -> None:
    """Raises BadStudy where the weights of a phase do not fit the model of the next one, as far as its
    config says it, and its columns where they exist."""
    seed = study.seeds[0]
    for phase in range(1, len(study.parts(entry))):
        before, after = (
            study.train_config(entry, seed, n).model.model_dump() for n in (phase - 1, phase)
        )
        # what a later phase leaves to the weights that it starts from, or an earlier one to its latent
        open_ = {k for k in after if {before[k], after[k]} & {None, "auto"}} | NOT_OF_WEIGHTS
        if "auto" in (before["patch_size"], after["patch_size"]):
            open_ |= {"pos_embed", "sample_size"}
        lines = [
            f"model.{k}: {before[k]!r} and {after[k]!r}"
            for k in after
            if k not in open_ and before[k] != after[k]
        ]
        a, b = (existing.training(entry, seed, n) for n in (phase - 1, phase))
        if a is not None and b is not None:
            lines += [
                f"{what}: {a['model'][key]} and {b['model'][key]}"
                for key, what in FROM_COLUMNS.items()
                if key in a["model"] and key in b["model"] and a["model"][key] != b["model"][key]
            ]
        if lines:
            title = f"{study.path}: {entry}: phase {phase + 1} cannot start from the weights of phase {phase}:"
            raise BadStudy(
                "\n  ".join([title, *lines])
                + "\nGive both phases the same model and latents of as many channels"
            )


def check_room(study: Study, missing: Sequence[Node]) -> None:
    """Raises NoSpace where a disk has less room than the missing nodes need. Nothing is said where
    neither a column nor `data.expect` tells the sizes of latents.
    """
    from .plan.cost import Assumptions, Costs  # loads torch
    from .plan.disk import refuse_if_full

    try:
        costs = Costs(study, Assumptions(gpus=study.ranks)).of(missing)
    except ConfigError:
        return
    refuse_if_full(costs)


def check_sampling_device(study: Study) -> None:
    """Raises BadStudy where `generate` names a device that this machine has not."""
    try:
        chosen_device(generate_settings(study)["device"])
    except BadRequest as error:
        raise BadStudy(f"{study.path}: generate: {error}") from None


def check_scorers(study: Study) -> None:
    """Raises BadStudy where a scorer's weights or references are missing, or it wants more pictures."""
    command = [sys.executable, "-m", f"{__package__}.run.ready", str(study.path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines()[-3:]
        raise BadStudy("\n  ".join([f"{study.path}: a scorer cannot score:", *lines]))


# Pairs --------------------------------------------------------------------------------------------


def aligned(study: Study, entry: str) -> Iterator[tuple[int, int]]:
    """Yields the phases of an entry and of the baseline that correspond, counted from the last."""
    own, base = len(study.parts(entry)), len(study.parts(study.baseline))
    for back in range(1, min(own, base) + 1):
        yield own - back, base - back


def check_pair(study: Study, entry: str, seed: int) -> None:
    """Raises NotPaired where the runs of an entry and of the baseline say of themselves that they
    differ in more than the YAML says; both must be trained.
    """
    for phase, base_phase in aligned(study, entry):
        sides = study.baseline, base_phase, entry, phase
        a, b = (
            training_of(manifest_of(folder / "checkpoints" / f"step-{config.steps:08d}"))
            for folder, config in (
                (study.run_folder(name, seed, number), study.train_config(name, seed, number))
                for name, number in ((study.baseline, base_phase), (entry, phase))
            )
        )
        refuse_unpaired(study, sides, a, b, seed)


def refuse_unpaired(
    study: Study, sides: tuple[str, int, str, int], a: Json, b: Json, seed: int | None = None
) -> None:
    allowed = allowed_keys(study, *sides)
    differ = {
        key: values
        for key, values in compared(a, b).beside.items()
        if not _is_below(key.rpartition("init.training.")[2], allowed)
        and not _is_below(key, allowed)
    }
    if differ:
        where = "" if seed is None else f" of seed {seed}"
        raise NotPaired(_message(study, f"the trainings{where}", sides[0], sides[2], differ))


def allowed_keys(
    study: Study, baseline: str, base_phase: int, entry: str, phase: int
) -> tuple[str, ...]:
    """Returns the keys of a training in which an entry may differ from the baseline."""
    seed = study.seeds[0]
    keys = set(study.config.differ)
    pairs = [(phase - back, base_phase - back) for back in range(min(phase, base_phase) + 1)]
    for own, base in pairs:  # the phases before it too, in the run that the weights came from
        first, second = (
            leaves(study.train_config(name, seed, number).model_dump(mode="json"))
            for name, number in ((baseline, base), (entry, own))
        )
        for key in first.keys() | second.keys():
            if first.get(key) == second.get(key):
                continue
            if key == "init_from" and own and base:  # each from the run of its phase before
                keys.update(("init.path", "init.sha256"))
                continue
            prefix = next((known for known in FOLLOWING if _is_below(key, (known,))), None)
            keys.update((key,) if prefix is None else FOLLOWING[prefix])
    return tuple(keys)


def _is_below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_sets(study: Study) -> None:
    """Raises NotPaired where sets of one seed and step are made in other ways than the YAML says."""
    for entry in study.entries[1:]:
        texts = (
            study.train_config(entry, 0).data.text
            != study.train_config(study.baseline, 0).data.text
        )
        allowed = OF_VAE | (OF_TEXT if texts else set()) | set(study.config.differ)
        allowed |= set(study.sampling_axes)
        for seed in study.seeds:
            for step in study.steps:
                folders = [study.set_folder(name, seed, step) for name in (study.baseline, entry)]
                if not all(map(study.is_settled, (study.baseline, entry))):
                    continue
                if not all((folder / "manifest.json").is_file() for folder in folders):
                    continue
                a, b = (read_manifest(folder / "manifest.json")["settings"] for folder in folders)
                differ = {
                    key: (a.get(key), b.get(key))
                    for key in sorted((a.keys() | b.keys()) - allowed)
                    if a.get(key) != b.get(key)
                }
                if differ:
                    where = f"the pictures of seed {seed} at step {step}"
                    raise NotPaired(_message(study, where, study.baseline, entry, differ))


def _message(study: Study, where: str, a: str, b: str, differ: Differing) -> str:
    lines = [f"{key}: {first!r:.80} and {second!r:.80}" for key, (first, second) in differ.items()]
    title = f"{study.path}: {where} of {a} and {b} differ in more than the YAML says:"
    advice = (
        "Train or make the wrong one again with the same settings; or, if it is meant to differ, list it: "
        f"differ: [{next(iter(differ))}]"
    )
    return "\n  ".join([title, *lines]) + f"\n{advice}"
