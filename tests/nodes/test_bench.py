"""`gradtap bench`: runs, tiny, and its JSON says what it must."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from nodes.benchmarks import published
from nodes.benchmarks.contenders import BASELINE
from nodes.benchmarks.timing import Case
from nodes.cli import main


def test_bench_exchange_runs_every_way_beside_its_baseline(capsys):
    arguments = ["--numel", "1000", "--worlds", "2", "--repetitions", "2"]
    assert main(["bench", "exchange", *arguments, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert {case["name"] for case in cases} == {
        BASELINE,
        "gloo, 25 MB buckets",
        "zeromq, ranks serve",
        "zeromq, 1 server",
        "zeromq, 2 servers",
        "pickle parameter server",
    }
    for case in cases:
        assert case["baseline"] == BASELINE and case["repetitions"] == 2
        assert 0 < case["fastest_s"] <= case["median_s"] and case["ratio"] > 0 and case["cpu_s"] >= 0
    assert [case["ratio"] for case in cases if case["name"] == BASELINE] == [1.0]


def test_bench_decode_checks_and_times_both_protocols_beside_a_plain_read(capsys):
    arguments = ["--numel", "30000", "--worlds", "2", "3", "--steps", "2", "--repetitions", "2"]
    assert main(["bench", "decode", *arguments, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    names = ["plain read, gloo", "decode, gloo", "plain read, zeromq", "decode, zeromq"]
    assert [(case["setting"]["ranks"], case["name"]) for case in cases] == [(w, name) for w in (2, 3) for name in names]
    for case in cases:
        assert case["baseline"] == f"plain read, {case['name'].split()[-1]}"
        assert case["ratio"] > 0 and case["mb_per_cpu_s"] > 0 and case["setting"]["file_bytes"] > 30000 * 4 * 2 * 2


def test_bench_codec_puts_every_limit_beside_its_figure(capsys):
    arguments = ["--numel", "3000", "--layers", "2", "--repetitions", "2", "--json"]
    assert main(["bench", "codec", *arguments]) == 0
    cases = {case["name"]: case for case in json.loads(capsys.readouterr().out)["cases"]}
    assert cases["sign"]["limit"] == 3.5 and cases["bf16"]["limit"] == 1.2
    for case in cases.values():
        assert case["baseline"] == "memory copy" and case["ratio"] > 0 and case["repetitions"] == 2


def test_bench_certificate_puts_predictions_beside_true_errors(capsys):
    assert main(["bench", "certificate", "--cases", "3", "--seed", "11", "--json"]) == 0
    summary, *rows = json.loads(capsys.readouterr().out)["cases"]
    assert summary["cases"] == len(rows) == 3 and summary["converged"] >= summary["predicted"] >= summary["covered"]
    for row in rows:
        assert (row["true_mse"] is not None) == (row["status"] == "converged")


def test_bench_labels_counts_them_beside_the_truth(capsys):
    arguments = ["--batch-size", "4", "--seeds", "1", "--trained", "0"]
    assert main(["bench", "labels", *arguments, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    whole = cases[-1]
    assert (whole["model"], whole["classes"], whole["batches"]) == ("all", "all", 24)
    assert whole["likeliest_right"] >= 22 and whole["exact_right"] >= 18 and whole["exact_wrong"] == 0


def test_bench_patterns_scores_only_what_converged(capsys):
    arguments = ["--data", "mnist", "--seeds", "2", "--method", "rgap", "--iterations", "3"]
    assert main(["bench", "patterns", *arguments, "--json"]) == 0
    summary, *rows = json.loads(capsys.readouterr().out)["cases"]
    assert summary["cases"] == len(rows) == 2 and summary["converged"] == summary["above_reference"] == 0
    for row in rows:  # rgap has no way through max pooling, and says so
        assert row["psnr_db"] is None and "MaxPool2d" in row["reason"] and row["reference_psnr_db"] > 0


@pytest.mark.lab
def test_bench_sentences_reads_captures_and_counts_tokens_by_iteration(capsys):
    arguments = ["--model", "gpt2:hidden=32,depth=1,heads=2", "--loss", "causal_lm", "--data", "prose:length=10"]
    arguments += ["--sentences", "2", "--steps", "1", "--methods", "dager", "tag", "--iterations", "25", "100"]
    assert main(["bench", "sentences", *arguments, "--json"]) == 0
    dager, tag, *rows = json.loads(capsys.readouterr().out)["cases"]
    assert len(rows) == 4 and {(row["rank"], row["method"]) for row in rows} == {
        (rank, method) for rank in (0, 1) for method in ("dager", "tag")
    }
    assert dager["converged"] == 2 and dager["exact_share"] == dager["token_share"] == dager["rougeL"] == 1
    assert dager["by_iteration"]["25"] is None and 0 < dager["most_tokens"] <= 10 < dager["bound"] == 30
    assert 0 <= tag["by_iteration"]["25"] <= tag["by_iteration"]["100"] <= 1


def test_bench_batches_scores_whole_batches(capsys):
    arguments = ["--models", "mlp:hidden=100/6", "lenet/2", "--data", "faces", "--seeds", "1"]
    assert main(["bench", "batches", *arguments, "--json"]) == 0
    connected, convolutional, *rows = json.loads(capsys.readouterr().out)["cases"]
    assert connected["converged"] == connected["exact_share"] == connected["labels_right"] == 1
    assert convolutional["batches"] == 1 and convolutional["good_share"] == 1
    assert [len(row["mse"]) for row in rows] == [6, 2]


def test_bench_batches_that_come_again(capsys):
    arguments = ["--models", "lenet/1", "--data", "faces", "--seeds", "1", "--steps", "2", "--json"]
    assert main(["bench", "batches", *arguments]) == 0
    _, row = json.loads(capsys.readouterr().out)["cases"]
    assert (row["steps"], row["status"]) == (2, "converged")


@pytest.mark.lab
def test_bench_attack_reads_pictures_out_of_captures_beside_the_published_loop(capsys):
    arguments = ["--images", "1", "--kinds", "photos", "--exchange", "ddp"]
    arguments += ["--references", "idlg", "--outer-steps", "2"]
    assert main(["bench", "attack", *arguments, "--json"]) == 0
    reference, ours, *rows = json.loads(capsys.readouterr().out)["cases"]
    assert reference["name"] == "published loop, iDLG" and reference["solved"] == 0 < reference["cpu_s"]
    assert ours["solved_with_label"] == ours["pictures"] == 1 and ours["median_psnr_db"] > 60
    assert {row["name"] for row in rows} == {reference["name"], ours["name"]}


def test_published_loops_arrive_where_they_are_known_to():
    torch.manual_seed(0)
    model, inputs, label = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 5)), torch.rand(1, 12), 3
    loss = functional.cross_entropy(model(inputs), torch.tensor([label]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert published.read_label(gradients).tolist() == [label]
    seen = []
    for told in (None, torch.tensor([label])):
        found, labels = published.deep_leakage(
            model, gradients, (12,), 5, watch=seen.append, label=told, generator=torch.Generator().manual_seed(0)
        )
        assert len(seen) % 300 == 0 and found.equal(seen[-1])
        assert labels.tolist() == [label] and torch.allclose(found, inputs, atol=1e-2)
    picture = published.inverting_gradients(
        nn.Sequential(nn.Flatten(), model),
        gradients,
        (1, 3, 4),
        torch.tensor([label]),
        total_variation=0.0,
        generator=torch.Generator().manual_seed(0),
        iterations=300,
    )
    assert 0 <= picture.min() <= picture.max() <= 1
    assert torch.allclose(picture.flatten(), inputs.flatten(), atol=0.1)


def test_ratios_are_paired():
    case = Case.of("new", [2.0, 20.0, 6.0], baseline=("old", [1.0, 10.0, 2.0]), setting={}, cpu_s=0.0)
    assert case.ratio == 2.0 and case.median_s == 6.0 and case.fastest_s == 2.0


@pytest.mark.parametrize("option", ["--numel", "--repetitions", "--worlds"])
def test_wrong_use_is_one_line_and_ends_2(option, capsys):
    assert main(["bench", "exchange", option, "0"]) == 2
    assert f"{option}: wanted at least 1, got 0" in capsys.readouterr().err


@pytest.mark.lab
def test_bench_step_puts_each_defense_beside_none(capsys):
    arguments = ["--defenses", "int8", "--ranks", "2", "--steps", "2", "--repetitions", "1", "--model", "mlp:hidden=20"]
    assert main(["bench", "step", *arguments, "--json"]) == 0
    plain, defended, again = json.loads(capsys.readouterr().out)["cases"]
    assert (plain["name"], defended["name"], again["name"]) == ("none", "int8", "none, again")
    # The median of two steps is their mean, so that parts add up whatever the machine is busy with.
    assert plain["rest_ratio"] == pytest.approx(1 - plain["encoding_ms"] / plain["step_ms"])
    assert plain["cpu_rest_ratio"] == pytest.approx(1 - plain["encoding_cpu_ms"] / plain["cpu_ms"])
    assert 0 < defended["encoding_ms"] < defended["step_ms"] and defended["rest_ratio"] > 0
    assert 0 < defended["encoding_cpu_ms"] < defended["cpu_ms"] and defended["cpu_rest_ratio"] > 0
