"""How the suite runs: in parallel, one thread a process, and without a download unless asked; see `tests/README.md`."""

import os


# Before torch is imported, and for the processes that tests start: two that fight for two cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import pytest


LEFT_OUT = ("slow", "network")
MOST_WORKERS = 8  # each takes 1 to 2 GB of memory


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that are marked slow or network")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process for each core; none beside this one for single tests, where starting them would take longest."""
    if _names_tests(config):
        return 0
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else MOST_WORKERS
    return min(psutil.cpu_count(logical=False) or 1, allowed, MOST_WORKERS)


def pytest_collection_modifyitems(config, items):
    if not _leaves_out(config):
        return
    kept = [item for item in items if not any(mark in item.keywords for mark in LEFT_OUT)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if _leaves_out(config):
        terminalreporter.write_line("Tests marked slow or network were left out: `pytest --all` runs everything.")


def _leaves_out(config):
    return not (config.option.all or config.option.markexpr or _names_tests(config))


def _names_tests(config):
    return any("::" in argument for argument in config.args)
