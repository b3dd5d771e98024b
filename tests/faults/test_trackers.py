"""W&B that cannot be reached, and W&B that dies: the folder is the record, and the run goes on."""

import json
import socket
import time

import pytest
from grids import folders

pytestmark = pytest.mark.faults


@pytest.fixture(params=["refused", "silent"])
def service(request):
    """Where nobody listens, or where somebody listens who never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_service_that_cannot_be_reached_costs_seconds(command, tmp_path, service):
    began = time.monotonic()
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": service}
    result = command("method=lora", "wandb.mode=online", **key)
    assert result.returncode == 0, result.stderr
    [folder] = folders(tmp_path)
    assert "W&B" in (folder / "run.log").read_text()
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("place", ["steps.jsonl", "predictions.jsonl"])
def test_a_tracker_that_dies_takes_nothing_along(command, tmp_path, fault, place):
    places = fault(**{f"seed1/{place}": "kill trackers"})
    result = command("method=lora", "wandb.mode=offline", **places)
    assert result.returncode == 0, result.stderr
    [folder] = folders(tmp_path)
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 3
    assert json.loads((folder / "scores.json").read_text())["scores"]["mean"]["num_rows"] == 6
