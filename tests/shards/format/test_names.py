"""Names of sources and columns."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards import open_store
from shards.format.names import checked_name, proposed, refuse_doubles

REFUSED = [
    "", ".", "..", " ", "a/b", "a\\b", "/abs", "../up", ".hidden", "end.", "end ", " start", "a\nb",
    "a\x1bb", "a\u202eb", "a\udcffb", "a?b", "a#b", "a%41", "index", "Index", "source.json",
    "report.json", "progress.json", "column.json", "zarr.json", "x" * 256, "é" * 128,
]  # fmt: skip
TAKEN = ["flux-512", "FLUX.1-dev", "my column", "été", "模型", "a..b", "a:b", "~a", "-a", "x" * 255]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_name_that_would_do(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Call it {proposed(name)}")):
        checked_name(name)
    assert checked_name(proposed(name)) == proposed(name)


@pytest.mark.parametrize(
    ("name", "would_do"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev"),
        ("google/gemma-2b/", "gemma-2b"),
        ("C:\\models\\vae", "vae"),
        ("../../etc", "etc"),
        ("index", "index-1"),
        ("report.json", "report-1"),
        ("a#b", "a-b"),
        ("..", "name-1"),
    ],
)
def test_proposed(name: str, would_do: str) -> None:
    assert proposed(name) == would_do


@given(st.text(max_size=300))
@example("x/.index")
@example("\u0130ndex")
def test_what_is_proposed_is_taken(name: str) -> None:
    assert checked_name(proposed(name)) == proposed(name)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_can_be_a_folder_anywhere(name: str, url: str, tmp_path: str) -> None:
    assert checked_name(name) == name
    for root in (url, tmp_path):
        column = open_store(root).child("source").child(name)
        assert column.put_if_absent("commits/0.json", b"1")
        again = open_store(column.url)
        assert (again.name, again.read("commits/0.json")) == (name, b"1")
        assert again.parent.url == open_store(root).child("source").url


def test_names_that_are_one_on_some_file_systems() -> None:
    refuse_doubles(["a", "b"])
    for first, second in (("flux", "FLUX"), ("\u00e9", "e\u0301"), ("straße", "STRASSE")):
        with pytest.raises(ValueError, match="differ in capitals alone"):
            refuse_doubles([first, "other", second])
