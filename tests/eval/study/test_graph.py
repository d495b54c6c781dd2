"""The YAML of a study, and the commands that follow from it: no column and no model exists here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import ConfigError
from encode import EncodeConfig
from eval.errors import BadStudy
from eval.study.axes import scored_steps
from eval.study.checks import (
    check_expected,
    check_out,
    check_phases,
    check_ranks,
)
from eval.study.config import flag_words
from eval.study.earlier import take_over
from eval.study.encoders import check_classes, check_encoders
from eval.study.flags import generate_settings
from eval.study.graph import Node, nodes_of
from eval.study.reuse import Existing
from eval.study.study import Study
from tests.shards.toy import moments_spec, write_column
from train.config import TrainConfig, run_folder

TRAIN = {
    "data": {"root": "cache", "sources": ["pets"], "latents": "plain", "text": "words", "lanes": 2},
    "model": {
        "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_size": 48,
        "pos_embed_max_size": 4, "sample_size": 8,
    },
    "steps": 1000, "global_batch": 4, "micro_batch": 4,
}  # fmt: skip
STUDY: dict[str, Any] = {
    "train": "train.yaml",
    "entries": {"plain": "plain", "equi": "equi"},
    "prompts": "prompts.json",
    "scorers": ["demo-acc", {"demo-fd": {"reference": "real", "allow-few": True}}],
    "ranks": 1,
    "checkpoints": 1,
    "settle": None,
}
# what is expected and what to do, as refusals say it
SEEDS = "expected a list of whole numbers from 0 on. Write one seed as [3], several as [0, 1, 2]\n"
CHECKPOINTS = (
    "expected how many steps are scored, 1,000 at most, or a list of steps, each a whole number from 1 on. Write 8 for "
    "eight of them, "
    "[5000, 10000] for these two\n"
)
RANGE = (
    "expected a list of two or more numbers above 0, of which one is chosen for each entry. Write such a list; or "
    "leave this key out and name one value for all entries"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))


def study(**values: Any) -> Study:
    values = {key.rstrip("_"): value for key, value in (STUDY | values).items()}
    Path("fair.yaml").write_text(
        yaml.safe_dump(
            {k: v for k, v in values.items() if v is not None or k == "settle"}, sort_keys=False
        )
    )
    return Study.open(Path("fair.yaml"))


def by_id(study: Study) -> dict[str, Node]:
    nodes = nodes_of(study)
    assert len({node.id for node in nodes}) == len(nodes)
    return {node.id: node for node in nodes}


def test_a_study_is_a_command_for_each_training_set_and_score() -> None:
    fair = study(seeds=[0, 3], generate={"guidance_scale": 3, "ema_weights": False})
    nodes = by_id(fair)
    assert [name.split("/")[0] for name in nodes] == 2 * [
        *2 * ["train"],
        *2 * ["generate"],
        *4 * ["score"],
    ]
    assert nodes["train/equi/seed3"].command == (
        "python", "-m", "train", "studies/fair/configs/equi.yaml", "seed=3",
    )  # fmt: skip
    pictures = nodes["generate/equi/seed3/step-00001000"]
    assert " ".join(pictures.command) == (
        "python -m eval generate --checkpoint studies/fair/runs/equi-seed3 --tag 1000 --prompts prompts.json "
        "--save_dir studies/fair/images/equi-seed3/step-00001000 --text_cache studies/fair/images/text "
        "--guidance_scale 3 --no-ema_weights"
    )
    assert pictures.needs == ("train/equi/seed3", "train/plain/seed3")
    score = nodes["score/demo-fd/equi/seed3/step-00001000"]
    assert score.command[3:] == (
        "score",
        "demo-fd",
        str(pictures.outputs[0]),
        "--reference",
        "real",
        "--allow-few",
    )
    assert score.needs == (pictures.id,)


def test_what_a_node_needs_comes_before_it() -> None:
    fair = study(
        entries={"a": {"latents": "plain", "phases": [{"steps": 10}, {"with": ["optim.lr=1e-5"]}]}, "b": "equi"},
        seeds=[1, 2], checkpoints=2,
    )  # fmt: skip
    done: set[str] = set()
    for node in nodes_of(fair):
        assert set(node.needs) <= done
        done.add(node.id)


def test_runs_see_the_rows_of_all_entries_and_keep_what_is_scored() -> None:
    fair = study(checkpoints=[10, 500], baseline="equi")
    assert fair.entries == ("equi", "plain")
    for entry in fair.entries:
        config = fair.train_config(entry, 7)
        assert config.data.also == ("equi", "plain")
        assert (config.save_at, config.seed, config.data.latents) == ((10, 500), 7, entry)


@pytest.mark.parametrize(
    "other", [{"text": "longer"}, {"with": ["data.text=longer"]}, {"text": {"longer": 0.5, "words": 0.5}}]
)  # fmt: skip
def test_runs_see_the_rows_of_all_texts(other: dict[str, Any]) -> None:
    """Of the training config's own too, which an entry with another text does not read."""
    fair = study(entries={"plain": "plain", "equi": {"latents": "equi"} | other})
    also = [{*fair.train_config(entry, 0).data.also} for entry in fair.entries]
    assert also == 2 * [{"plain", "equi", "words", "longer"}]


def test_a_step_that_a_shorter_training_never_comes_to_is_not_waited_for() -> None:
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN | {"save_at": [50, 500, 1000]}))
    fair = study(entries={"plain": "plain", "equi": {"latents": "equi", "steps": 100}}, checkpoints=[100])  # fmt: skip
    saved = [[path.name for path in node.outputs] for node in nodes_of(fair) if node.kind == "train"]  # fmt: skip
    assert saved[0] == [f"step-{step:08d}" for step in (50, 100, 500, 1000)]
    assert saved[1] == ["step-00000050", "step-00000100"]
    assert fair.train_config("equi", 0).save_at == (50, 100)


def test_phases_follow_one_another_seed_by_seed() -> None:
    phases = [{"latents": "small", "steps": 50}, {"steps": 20, "with": ["optim.lr=1e-5"]}]
    fair = study(
        entries={"two": {"latents": "plain", "with": ["ema.decay=0.5"], "phases": phases}, "one": "equi"},
        with_=["steps=20"],
    )  # fmt: skip
    first, last = fair.train_config("two", 1, 0), fair.train_config("two", 1)
    assert (first.steps, first.data.latents, first.init_from, first.save_at) == (
        50,
        "small",
        None,
        (),
    )
    assert (last.steps, last.data.latents, last.optim.lr) == (20, "plain", 1e-5)
    assert first.ema.decay == last.ema.decay == 0.5
    assert (
        last.init_from
        == fair.run_folder("two", 1, 0)
        == Path("studies/fair/runs/two-phase1-small-seed1")
    )
    assert first.data.also == ("small",)
    assert last.data.also == ("plain", "equi")
    nodes = by_id(fair)
    command = nodes["train/two/phase2/seed1"].command
    assert command[3:] == (
        "studies/fair/configs/two-phase2.yaml",
        "seed=1",
        f"init_from={last.init_from}",
    )
    assert nodes["train/two/phase2/seed1"].needs == ("train/two/phase1/seed1",)
    assert fair.steps == (20,)


def test_a_missing_column_is_encoded_first() -> None:
    Path("encode.yaml").write_text(
        yaml.safe_dump(
            {
                "root": "cache",
                "sources": {"pets": "pets/{0..3}.tar", "photos": "photos.tar"},
                "columns": {"words": {"kind": "ids", "encoder": "gemma-2b"}},
            }
        )
    )
    entries = {"plain": "plain", "new": {"latents": "new", "encoder": "flux", "resolution": 32}}
    fair = study(entries=entries, encode="encode.yaml")
    (path, (config, columns)), *rest = fair.encode_configs.items()
    assert (rest, columns) == ([], ("cache/pets/new",))
    assert isinstance(config, EncodeConfig)
    assert list(config.columns) == ["new"]
    assert list(config.sources) == ["pets"]
    first, second = nodes_of(fair)[:2]
    assert first.command == ("python", "-m", "encode", "run", str(path))
    assert second.needs == (first.id,)


def test_a_class_of_ones_own_is_allowed_where_the_study_names_it() -> None:
    encode = {"root": "cache", "sources": {"pets": "pets.tar"}, "columns": {}}
    Path("encode.yaml").write_text(yaml.safe_dump(encode))
    own = {"latents": "new", "encoder": {"class": "mine.code:Class"}, "resolution": 32}
    entries = {"plain": "plain", "new": {**own, "kind": "latents"}}
    fair = study(entries=entries, encode="encode.yaml")
    check_encoders(fair)  # a path that only the class knows
    pictures = [node.command for node in nodes_of(fair) if node.kind == "generate"]
    assert pictures
    assert all(words[-2:] == ("--allow-class", "mine.code:Class") for words in pictures)
    named = study(entries=entries, encode="encode.yaml", generate={"allow_class": ["a:B"]})
    pictures = [node.command for node in nodes_of(named) if node.kind == "generate"]
    assert all(words[-3:] == ("--allow-class", "a:B", "mine.code:Class") for words in pictures)
    assert generate_settings(named)["allow_class"] == ["a:B"]


def test_a_column_of_somebodys_class_needs_the_class_named_before_anything_runs() -> None:
    identity = {"encoder": {"class": "mine.code:Class", "path": "", "weights": "0" * 64}}
    for name in ("plain", "own"):
        spec = moments_spec()
        if name == "own":
            spec = replace(spec, identity={**spec.identity, **identity})
        write_column(Path("cache/pets") / name, spec)
    entries = {"plain": "plain", "own": "own"}
    with pytest.raises(
        BadStudy, match=r"own: .*say generate: \{allow_class: \[mine.code:Class\]\}"
    ):
        check_classes(study(entries=entries))
    check_classes(study(entries=entries, generate={"allow_class": ["mine.code:Class"]}))


def test_two_links_to_one_column_are_one_entry() -> None:
    Path("column").mkdir()
    for name in ("first", "second"):
        Path(name).symlink_to("column")
    here = Path.cwd()
    entries = {"a": f"{here}/first", "b": f"{here}/second/"}
    with pytest.raises(BadStudy, match="a and b differ in nothing"):
        study(entries=entries, with_=[f"data.text={here}/words"])


def test_encode_configs_of_one_name_are_two_commands() -> None:
    for name in ("first", "second"):
        column = {name: {"kind": "moments", "encoder": "flux", "resolution": 32}}
        config = {"root": "cache", "sources": {"pets": "pets.tar"}, "columns": column}
        Path(name).mkdir()
        Path(name, "vae.yaml").write_text(yaml.safe_dump(config))
    entries = {n: {"latents": n, "encoder": f"{n}/vae.yaml"} for n in ("first", "second")}
    names = [name for name, node in by_id(study(entries=entries)).items() if node.kind == "encode"]
    assert names == ["encode/vae", "encode/vae-2"]


def test_every_process_has_a_gpu() -> None:
    fair = replace(study(ranks=4), jobs=2)
    check_ranks(fair, 8)
    check_ranks(fair, 0)  # on CPUs there are as many as one likes
    with pytest.raises(BadStudy, match="found 4, expected at most 2: 4 GPUs are visible"):
        check_ranks(fair, 4)
    check_ranks(replace(study(ranks=1), jobs=2), 1)  # they share it


def test_phases_have_one_model() -> None:
    def phases(*words: str, first: str = "optim.lr=1e-3") -> Study:
        parts = [{"with": [first]}, {"with": list(words)}]
        return study(entries={"a": {"latents": "plain", "phases": parts}, "b": "equi"})

    def check(fair: Study) -> None:
        check_phases(fair, "a", Existing(fair))

    check(phases("optim.lr=1e-5", "model.initializer_range=0.01"))
    check(phases("model.patch_size=auto"))  # then it is that of the weights
    with pytest.raises(BadStudy, match=r"a: phase 2 cannot start(.|\n)*model\.layers: 2 and 3"):
        check(phases("model.layers=3"))
    with pytest.raises(BadStudy, match=r"model\.patch_size: 2 and 4"):
        check(phases("model.patch_size=4"))


def test_a_model_narrower_than_the_tokens_to_be_is_seen_without_columns() -> None:
    expect = {"channels": 64, "height": 8, "width": 8, "text_width": 32}
    words = [f"data.expect={json.dumps(expect)}", "model.pos_embed_max_size=8"]
    fair = study(
        with_=words,
        entries={"plain": {"latents": "plain", "with": ["model.patch_size=1"]}, "equi": "equi"},
    )
    with pytest.raises(ConfigError, match="plain: model: found tokens of 64 x 1 x 1 = 64 values"):
        check_expected(fair, "plain", 0)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    for out in (tmp_path / "train.yaml", tmp_path / "train.yaml/below"):
        with pytest.raises(BadStudy, match="train.yaml: found a file, expected a folder"):
            check_out(replace(study(), out=out))
    check_out(replace(study(), out=tmp_path / "not/yet"))


def test_several_processes_and_ids() -> None:
    fair = study(ranks=4, with_=["data.encoder=gemma-2b", "micro_batch=1"])
    command = by_id(fair)["train/plain/seed0"].command
    assert command[:4] == ("torchrun", "--standalone", "--nproc-per-node", "4")
    assert command[6:] == ("-m", "eval", "train", "studies/fair/configs/plain.yaml", "seed=0")


def test_the_folders_are_those_of_the_trainers_rule() -> None:
    fair = study()
    path = fair.config_path("equi")
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(fair.train_config("equi", 0).model_dump(mode="json")))
    loaded = configs.load(TrainConfig, path, ["seed=2"])
    assert loaded == fair.train_config("equi", 2)
    assert run_folder(loaded, path) == fair.run_folder("equi", 2)


def test_eight_steps_are_scored_unless_the_study_says_otherwise() -> None:
    """Equally spaced in log samples from a tenth of the training on: each is 10 ** (1 / 7) times the one before."""
    assert study(checkpoints=None).steps == (100, 139, 193, 268, 373, 518, 720, 1000)


def test_scored_steps() -> None:
    assert scored_steps(1, 1000) == (1000,)
    assert scored_steps(3, 1000) == (100, 316, 1000)
    assert scored_steps(5, 4) == (1, 2, 4)
    assert scored_steps([7, 3], 10) == (3, 7)


def test_folders_of_runs_by_hand_that_are_absent_or_strange(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("old/run").mkdir(parents=True)
    Path("old/run/config.yaml").write_text("seed: [1]")
    fair = take_over(study(reuse=["old", "odl"]))
    assert (fair.hand_runs, fair.hand_sets) == ({}, {})
    assert [record.getMessage() for record in caplog.records] == [
        "fair.yaml: reuse: found no folder odl: nothing of it is taken over"
    ]


def test_pictures_of_a_prompt() -> None:
    for count, expected in ((4, 4), ("4", 4), (None, 1)):
        assert study(generate={"n_samples": count}).images_per_prompt == expected
    for flags in ({"n_samples": [4]}, {"n_samples": 4, "num_samples": 2}):
        with pytest.raises(BadStudy, match="Write n_samples: "):
            generate_settings(study(generate=flags))


def test_flags_as_words() -> None:
    flags = {"a": 1.5, "b": True, "c": False, "d": None, "e": [0.1, 0.9], "f": "x y"}
    assert flag_words(flags) == ("--a", "1.5", "--b", "--no-c", "--e", "0.1", "0.9", "--f", "x y")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baseline": "flux"}, "baseline: found 'flux', expected one of plain, equi"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is named twice"),
        ({"seeds": [True]}, "found [true], expected a number"),
        ({"scorers": ["geneval", {"geneval": {}}]}, "scorers: geneval is named twice"),
        ({"scorers": [{"fid": {}, "kid": {}}]}, "expected one name with its flags each"),
        ({"scorers": []}, "scorers"),
        ({"generate": {"half": "a"}}, "half is set by the study itself"),
        ({"checkpoints": [5, 5]}, "checkpoints: 5 is named twice"),
        ({"benchmark": "geneval"}, "expected one of benchmark"),
        ({"prompts": None}, "expected one of benchmark"),
        ({"prompts": None, "benchmark": "genevil"}, "found 'genevil', expected one of coco30k"),
        ({"entries": {"a": "plain"}}, "found 1 entry, expected two"),
        ({"entries": {"a": "plain", "A": "equi"}}, "differ in capitals alone"),
        ({"entries": {"a/b": "plain", "c": "equi"}}, "names folders"),
        ({"entries": {"a-seed1": "plain", "c": "equi"}}, "names folders"),
        ({"entries": {"encode": "plain", "c": "equi"}}, "'encode' is a file of the study's own"),
        ({"entries": {"a": {"text": "words"}, "c": "equi"}}, "a: no latents"),
        ({"generate": {"tag": 3}}, "tag is set by the study itself"),
        ({"generate": {"save-dir": "x"}}, "save_dir is set by the study itself"),
        ({"generate": {"tag=3": True}}, "tag is set by the study itself"),
        ({"with_": ["seed=7"]}, "seed is set by the study itself: leave it out, list it in the study's `seeds`"),
        ({"with_": ["runs=elsewhere"]}, "runs is set by the study itself"),
        ({"with_": [" data.latents = other"]}, "name it as the entry's `latents`"),
        ({"entries": {"a": {"latents": "plain", "with": ["seed=7"]}, "b": "plain"}}, "entries.a.with: found"),
        (
            {"entries": {"a": {"latents": "plain", "phases": [{}, {"with": ["init_from=x"]}]}, "b": "equi"}},
            "Only the first may name others",
        ),
        ({"seeds": 3}, f"seeds: found 3, {SEEDS}"),
        ({"seeds": ["x"]}, f"seeds: found [x], {SEEDS}"),
        ({"seeds": [0, -1]}, f"seeds: found [0, -1], {SEEDS}"),
        ({"seeds": []}, f"seeds: found [], {SEEDS}"),
        ({"checkpoints": [0.5]}, f"checkpoints: found [0.5], {CHECKPOINTS}"),
        ({"checkpoints": 0}, f"checkpoints: found 0, {CHECKPOINTS}"),
        ({"checkpoints": []}, f"checkpoints: found [], {CHECKPOINTS}"),
        ({"checkpoints": 10**9}, f"checkpoints: found 1000000000, {CHECKPOINTS}"),
        (
            {"settle": {"guidance_scale": 3}},
            f"settle.guidance_scale: found 3, {RANGE}: generate: {{guidance_scale: 3}}",
        ),
        ({"settle": {"shift": [0, 2]}}, f"settle.shift: found [0, 2], {RANGE}: generate: {{shift: 2}}"),
        ({"settle": {"ema": [0.1]}}, f"settle.ema: found [0.1], {RANGE}: generate: {{ema: 0.1}}"),
        ({"settle": {"lr": 0.1}}, f"settle.lr: found 0.1, {RANGE}: with: [optim.lr=1e-4]"),
        ({"generat": {}}, "unknown key; did you mean generate?"),
        ({"with_": ["optim.rl=1"]}, "unknown key; did you mean"),
    ],
)  # fmt: skip
def test_a_yaml_that_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        study(**values)
    assert message in f"{error.value}\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entries": {"a": "plain", "b": {"latents": "plain"}}}, "the entries a and b differ in nothing"),
        (
            {"entries": {"a": "plain", "b": {"latents": "plain", "with": ["log_every=3", "keep=9"]}}},
            "a and b differ in nothing",
        ),
        ({"entries": {"a": "b-c", "a-b": "c"}}, "would share the folder studies/fair/runs/a-b-c"),
        (
            {
                "entries": {
                    "a": {"latents": "new", "phases": [
                        {"encoder": "flux", "resolution": 32}, {"encoder": "flux", "resolution": 64},
                    ]},
                    "b": "plain",
                }
            },
            "is to be encoded in two ways, by a as",
        ),
        ({"checkpoints": [10, 1001]}, "found step 1001, but plain is trained for 1000 steps"),
        ({"entries": {"a": "plain", "b": {"latents": "equi", "steps": 5}}}, "other numbers of steps (a 1000, b 5)"),
        ({"entries": {"a": "plain", "b": {"latents": "equi", "encoder": "flux"}}}, "b has an encoder and no"),
        (
            {"entries": {"a": "plain", "b": {"latents": "equi", "encoder": "flux", "resolution": 32}}},
            "cache/pets/equi, which are to be encoded by encode.yaml, but that makes elsewhere/pets/equi. Name one",
        ),
    ],
)  # fmt: skip
def test_a_study_that_is_refused(values: dict[str, Any], message: str) -> None:
    root = "cache" if "two ways" in message else "elsewhere"
    encode = {"root": root, "sources": {"pets": "pets.tar"}, "columns": {}}
    Path("encode.yaml").write_text(yaml.safe_dump(encode))
    with pytest.raises(BadStudy, match=re.escape(message)):
        study(encode="encode.yaml", **values)
