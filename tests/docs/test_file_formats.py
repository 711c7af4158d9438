"""docs/file-formats.md: names and versions are the code's, and the fields of a plan are exactly those of its class."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

import mopeq_edge.calibrate.modalities as modalities
import mopeq_edge.calibrate.statistics as routing
import mopeq_edge.calibrate.traces as traces
import mopeq_edge.convert as convert
import mopeq_edge.evaluate.reference as reference
import mopeq_edge.plan.artifact as plan
import mopeq_edge.sensitivity.table as sensitivity
import mopeq_edge.source.described as described
import mopeq_edge.source.digests as digests
import mopeq_edge.workdir as workdir
from mopeq_edge import pipeline_calibrate
from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.output_kvs import Provenance, output_kvs
from mopeq_edge.plan.artifact import Plan, PlannedGroup, PlannedTensor

from .pages import ROOT

PAGE = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")


def row(first: str) -> str:
    found = re.search(rf"^\| {re.escape(first)}(?:,| \|)(.*)$", PAGE, re.MULTILINE)
    assert found is not None, first
    return found[1]


@pytest.mark.parametrize(
    ("file", "name", "version"),
    [
        ("stages.json", workdir.FORMAT, workdir.VERSION),
        (pipeline_calibrate.ROUTING_FILE, routing.FORMAT, routing.VERSION),
        (pipeline_calibrate.MODALITIES_FILE, modalities.FORMAT, modalities.VERSION),
        (pipeline_calibrate.BY_KIND_FILE, pipeline_calibrate.BY_KIND_FORMAT, pipeline_calibrate.BY_KIND_VERSION),
        (pipeline_calibrate.TRACE_FILE, traces.FORMAT, traces.VERSION),
        ("sensitivity-KIND.safetensors", sensitivity.FORMAT, sensitivity.VERSION),
        ("description.gguf", described.FORMAT, described.VERSION),
        ("plan.json", plan.FORMAT, plan.VERSION),
        ("imatrix-choice.json", convert.CHOICE_FORMAT, convert.VERSION),
        ("validation.json", convert.VALIDATION_FORMAT, convert.VERSION),
    ],
)
def test_names_and_versions(file: str, name: str, version: object) -> None:
    assert f'`"{name}"` {version} |' in row(f"`{file}`")


def test_formats_without_a_name() -> None:
    assert f"format {digests.CACHE_FORMAT} |" in row("`hashes.json`")
    assert f"format {reference.FORMAT} |" in row("`reference-*/`")


def test_the_fields_of_a_plan() -> None:
    table = PAGE.partition("## plan.json")[2].partition("\nEach tensor")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {"format", "version", *(field.name for field in fields(Plan))}
    sentence = PAGE.partition("\nEach tensor")[2].partition("\n## ")[0]
    for field in (*fields(PlannedTensor), *fields(PlannedGroup)):
        assert f"`{field.name}`" in sentence


def test_the_keys_of_a_file() -> None:
    table = PAGE.partition("## In the GGUF")[2].partition("\nAll others")[0]
    named = set(re.findall(r"`(mopeq\.[a-z_.0-9]+)`", table))
    ours = {key for key in output_kvs({}, 0, None, "", Provenance()) if key.startswith("mopeq.")}
    assert named == ours | {VERSION_KEY}
