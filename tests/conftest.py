"""Shared test set-up: deterministic threads, and warnings of other people's imports kept out of our own filter."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    # diffusers, transformers and torchao warn while they are imported; that is not ours to mend.
    warnings.simplefilter("ignore")
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_threads():
    torch.set_num_threads(1)
    return


@pytest.fixture(autouse=True)
def _gradients_stay_on():
    """What a test switches off must not spoil the tests behind it."""
    yield
    leaked = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not leaked, "gradients were left switched off"


class Grouping:
    """Marks what needs a GPU, and keeps together what shares its set-up when several processes run the tests.

    That is a file, or in the contract one technique's checks: the contract is too long for one process. A plugin of its
    own, as the hook of a conftest.py below the root is called after xdist has looked for marks.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            technique = getattr(item, "callspec", None) and item.callspec.params.get("name")
            in_contract = item.path.name == "test_contract.py" and technique
            group = (
                f"contract of {technique}"
                if in_contract
                else str(item.path.relative_to(item.config.rootpath))
            )
            item.add_marker(pytest.mark.xdist_group(group.replace("/", ".")))
            if "contract" in item.path.parts:
                item.add_marker(pytest.mark.contract)
            if "gpu" in item.keywords and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_configure(config):
    config.pluginmanager.register(Grouping(), "grouping")
