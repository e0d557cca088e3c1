"""Student files: every way of storing against the tensors themselves, sums of students, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vivace.core.errors import ConfigError, WeightsError
from vivace.models.student import (
    merge_students,
    read_head,
    save_student,
    student_shapes,
    student_tensors,
    weights_hash,
)
from vivace.models.student_artifact import Artifact, Sampler, noise_levels


def base_state():
    """Weights of several kinds: matrices, a convolution, a norm, a table, a buffer of integers."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return {
        "blocks.0.to_q.weight": draw(24, 16),
        "blocks.0.to_q.bias": draw(24),
        "blocks.0.norm.weight": draw(16),
        "patch.weight": draw(8, 4, 1, 2, 2),
        "scale_shift_table": draw(1, 6, 16),
        "steps": torch.arange(5),
    }


def student_of(base, seed=1, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v + size * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v.clone()
        for k, v in base.items()
    }


def read(path, base):
    return dict(student_tensors([path], base.__getitem__))


def error(found, student, base, name):
    """Error of a tensor, as a share of what the student changes."""
    return float((found[name] - student[name]).norm() / (student[name] - base[name]).norm())


def test_deltas_in_int8_are_as_exact_as_their_codes(tmp_path):
    base = base_state()
    student = student_of(base)
    path = save_student(tmp_path / "s.safetensors", student, base, Artifact())
    found = read(path, base)
    assert found.keys() == student.keys() - {"steps"} | {"steps"}
    for name in ("blocks.0.to_q.weight", "patch.weight"):
        # One code is 1/127 of a row's largest change; rounding is at most half of it.
        step = (student[name] - base[name]).flatten(1).abs().amax(1) / 127
        assert ((found[name] - student[name]).flatten(1).abs().amax(1) <= 0.51 * step).all()
        assert error(found, student, base, name) < 0.01
    for name in ("blocks.0.to_q.bias", "blocks.0.norm.weight", "scale_shift_table"):
        assert torch.allclose(found[name], student[name], atol=1e-6)
    assert torch.equal(found["steps"], student["steps"])
    stored = load_file(path)
    assert stored["blocks.0.to_q.weight::delta"].dtype == torch.int8
    assert student_shapes([path]) == {k: tuple(v.shape) for k, v in student.items()}


def test_what_the_student_leaves_alone_is_not_stored(tmp_path):
    base = base_state()
    student = base | {"blocks.0.to_q.bias": base["blocks.0.to_q.bias"] + 1.0}
    path = save_student(tmp_path / "s.safetensors", student, base, Artifact())
    assert set(load_file(path)) == {"blocks.0.to_q.bias::delta", "steps"}


def test_full_weights_in_int8_and_bf16(tmp_path):
    base = base_state()
    student = student_of(base)
    codes = read(save_student(tmp_path / "i.safetensors", student, None, Artifact(), "int8"), {})
    half = read(save_student(tmp_path / "h.safetensors", student, None, Artifact(), "bf16"), {})
    for name, value in student.items():
        assert torch.equal(half[name], value.bfloat16() if value.is_floating_point() else value)
        if name.endswith("weight") and value.ndim >= 2:
            step = value.flatten(1).abs().amax(1, keepdim=True) / 127
            assert ((codes[name] - value).flatten(1).abs() <= 0.51 * step).all()
        else:
            assert torch.equal(codes[name], value)


@pytest.mark.parametrize("kind", ["lora", "int8-lora"])
def test_a_low_rank_delta_is_found_and_a_full_one_is_cut(tmp_path, kind):
    base = base_state()
    name, generator = "blocks.0.to_q.weight", torch.Generator().manual_seed(3)
    low = torch.randn(24, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    exact = base | {name: base[name] + 0.1 * low}
    found = read(save_student(tmp_path / "a.safetensors", exact, base, Artifact(), f"{kind}:3"), base)
    assert error(found, exact, base, name) < (0.01 if kind == "lora" else 0.02)  # the factors are rounded
    student, errors = student_of(base), []
    for rank in (1, 4, 12):
        path = save_student(tmp_path / f"{rank}.safetensors", student, base, Artifact(), f"{kind}:{rank}")
        found = read(path, base)
        singular = torch.linalg.svdvals(student[name] - base[name])
        best = float(singular[rank:].norm() / singular.norm())
        errors.append(error(found, student, base, name))
        assert errors[-1] == pytest.approx(best, abs=0.01)
        near = 1e-6 if kind == "lora" else 0.01  # small deltas are in bf16 where factors are codes
        assert torch.allclose(found["patch.weight"], student["patch.weight"], atol=near)
        assert student_shapes([path])[name] == (24, 16)
    assert errors == sorted(errors, reverse=True)


def test_second_time_is_kept_as_it_is(tmp_path):
    base, extra = base_state(), {"second_time.linear_1.weight": torch.randn(4, 4)}
    for store in ("int8-delta", "int8", "lora:2", "int8-lora:2"):
        path = save_student(
            tmp_path / f"{store[:4]}.safetensors", student_of(base) | extra, base, Artifact(), store
        )
        assert torch.equal(
            read(path, base)["second_time.linear_1.weight"], extra["second_time.linear_1.weight"]
        )


def test_the_artefact_travels_in_the_file(tmp_path):
    sampler = Sampler(steps=3, sigmas=(1.0, 0.757, 0.522), guidance=1.0, solver="consistency")
    said = Artifact(
        "dmd2", "f00", sampler, {"lr": 1e-5}, "teacher", "data", {"licence": "Apache-2.0", "steps": [1, 2]}
    )
    base = base_state()
    path = save_student(tmp_path / "deep" / "s.safetensors", student_of(base), base, said)
    assert Artifact.of(path) == said
    other = Artifact("another")
    other.write(path.parent)
    assert Artifact.of(path) == said
    assert Artifact.of(path.parent) == other
    (path.parent / "artifact.json").unlink()
    assert Artifact.of(path.parent) == said
    assert read_head(path).base == weights_hash(base)
    assert not list(path.parent.glob("*.partial"))


def test_the_artefact_of_before_is_read(tmp_path):
    old = {
        "recipe": "dmd2",
        "base": "f00",
        "sampler": {"steps": 4, "sigmas": None, "shift": 5.0, "guidance": 1.0},
    }
    (tmp_path / "artifact.json").write_text(json.dumps(old))
    assert Artifact.of(tmp_path) == Artifact("dmd2", "f00", Sampler(4, None, 5.0, 1.0))


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ({"solver": "magic"}, "the solver is one of"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must fall"),
        ({"sigmas": [1.2]}, "fall"),
    ],
)
def test_a_contract_that_cannot_be_is_refused(sampler, words, tmp_path):
    (tmp_path / "artifact.json").write_text(json.dumps({"sampler": sampler}))
    with pytest.raises(WeightsError, match=words):
        Artifact.of(tmp_path)


def test_levels_of_a_contract():
    assert Sampler(steps=4, shift=5.0).levels() == pytest.approx((1.0, 0.9375, 0.8333333, 0.625))
    assert Sampler(sigmas=(1.0, 0.5, 0.0)).levels() == (1.0, 0.5)
    assert Sampler().levels() is None
    assert noise_levels(2) == (1.0, 0.5)


def test_deltas_of_students_add_up(tmp_path):
    base = base_state()
    a, b = student_of(base, 1), student_of(base, 2)
    sampler = Sampler(steps=4, solver="consistency")
    first = save_student(tmp_path / "a.safetensors", a, base, Artifact("sparse"))
    second = save_student(tmp_path / "b.safetensors", b, base, Artifact("rcm", sampler=sampler), "lora:16")
    out = merge_students([first, second], [1.0, 0.5], tmp_path / "m.safetensors")
    found = read(out, base)
    for name in (n for n in base if n != "steps"):
        wanted = base[name] + (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        assert torch.allclose(found[name], wanted, atol=2e-3), name
    said = Artifact.of(out)
    assert (said.recipe, said.sampler) == ("merge", sampler)
    assert [p["weight"] for p in said.settings["parts"]] == [1.0, 0.5]
    assert read_head(out).base == weights_hash(base)
    full = save_student(tmp_path / "f.safetensors", b, None, Artifact(), "bf16")
    out = merge_students([first, full], [0.0, 1.0], tmp_path / "n.safetensors", base_state=base)
    assert (
        error(read(out, base), b, base, "blocks.0.to_q.weight") < 0.3
    )  # bf16 rounds weights 50 times the delta


def test_students_that_do_not_add_are_refused(tmp_path):
    base, other = base_state(), student_of(base_state(), 9, 1.0)
    first = save_student(tmp_path / "a.safetensors", student_of(base), base, Artifact())
    strange = save_student(tmp_path / "b.safetensors", student_of(other), other, Artifact())
    full = save_student(tmp_path / "f.safetensors", student_of(base), None, Artifact(), "int8")
    out = tmp_path / "m.safetensors"
    with pytest.raises(WeightsError, match="another base"):
        merge_students([first, strange], [1.0, 1.0], out)
    with pytest.raises(WeightsError, match="another base"):
        merge_students([first], [1.0], out, base_state=other)
    with pytest.raises(WeightsError, match="give base_state"):
        merge_students([first, full], [1.0, 1.0], out)
    with pytest.raises(ConfigError, match="one weight for each"):
        merge_students([first], [1.0, 2.0], out)
    with pytest.raises(ConfigError, match="int8-delta, lora"):
        merge_students([first], [1.0], out, store="bf16")
    times = [
        save_student(
            tmp_path / f"{i}.safetensors",
            student_of(base) | {"second_time.linear_1.weight": torch.full((2, 2), float(i))},
            base,
            Artifact(),
        )
        for i in range(2)
    ]
    with pytest.raises(WeightsError, match=r"second_time.*differs between"):
        merge_students(times, [1.0, 1.0], out)
    assert not out.exists()


def test_what_cannot_be_saved_or_read_is_refused(tmp_path):
    base = base_state()
    student, path = student_of(base), tmp_path / "s.safetensors"
    with pytest.raises(ConfigError, match="stored as one of"):
        save_student(path, student, base, Artifact(), "lora:0")
    with pytest.raises(WeightsError, match="give base_state"):
        save_student(path, student, None, Artifact())
    with pytest.raises(WeightsError, match=r"same tensors, e\.g\. extra"):
        save_student(path, student | {"extra": torch.zeros(1)}, base, Artifact())
    with pytest.raises(WeightsError, match="another shape"):
        save_student(path, student | {"blocks.0.to_q.bias": torch.zeros(2)}, base, Artifact())
    save_file({"a": torch.zeros(1)}, path, {"vivace_student": "{}"})
    with pytest.raises(WeightsError, match="damaged head"):
        read_head(path)
    head = {"format": "vivace-student", "version": 99, "store": "int8", "base": ""}
    save_file({"a": torch.zeros(1)}, path, {"vivace_student": json.dumps(head)})
    with pytest.raises(WeightsError, match="version 99"):
        read_head(path)
    save_file({"a::up": torch.zeros(2, 1)}, path)
    with pytest.raises(WeightsError, match="lacks a::down"):
        student_shapes([path])


def test_the_hash_of_weights_is_the_same_in_bf16_and_another_for_others():
    base = {k: v.bfloat16().float() if v.is_floating_point() else v for k, v in base_state().items()}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in base.items()}
    assert weights_hash(base) == weights_hash(half)
    assert weights_hash(base) != weights_hash(student_of(base))
    layer = nn.Linear(4, 4)
    with_time = {**layer.state_dict(), "second_time.linear_1.weight": torch.zeros(2)}
    assert weights_hash(layer.state_dict()) == weights_hash(with_time)
