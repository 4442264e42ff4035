"""What a process keeps between messages changes no result, and writes behind training are safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clients import workers
from clients.local import open_local_client
from clients.workers import WriteBehind, borrowed
from fedpdm.config import RunConfig
from fedpdm.engines.inprocess import run_in_process
from fedpdm.storage.files import StoreError
from tests.support.federations import flat, node, small_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_shelf() -> Iterator[None]:
    workers._shelf.clear()
    yield
    workers._shelf.clear()


def files(out: Path) -> dict[str, bytes]:
    """Every model and training state of a run."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*.safetensors"))
        if "server" not in path.parts  # its checkpoint has times in it
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_kept_trainers_and_late_writes_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = small_config(
        run={"rounds": 3},
        data={"max_images": 160},
        partition={"num_clients": 2},
        aggregation={"method": method},
        evaluation={"image_metrics": False},
    )
    run_in_process(config, tmp_path / "kept")
    assert workers._shelf
    run_in_process(config, tmp_path / "again")  # on a shelf full of another run's trainers
    workers._shelf.clear()
    monkeypatch.setattr(workers, "KEPT_BYTES", 0)
    run_in_process(config, tmp_path / "anew")
    assert not workers._shelf
    wanted = files(tmp_path / "anew")
    assert len([name for name in wanted if name.endswith("fine.safetensors")]) == 2 * 2
    assert files(tmp_path / "kept") == files(tmp_path / "again") == wanted


def local(config: RunConfig, out: Path):
    return open_local_client(node(config, 0), flat(config, out), 0)


def test_a_trainer_is_lent_to_one_at_a_time_and_comes_back(tmp_path: Path) -> None:
    config = small_config()
    client = local(config, tmp_path)
    options = {"device": CPU, "fresh": False}
    with (
        borrowed(client, "fine", **options) as first,
        borrowed(client, "fine", **options) as second,
        borrowed(client, "coarse", **options) as other,
    ):
        assert first is not second
        assert other.model.spec.knows_clipping is False
    with borrowed(client, "fine", **options) as again:
        assert again in (first, second)


def test_a_fresh_trainer_has_the_seeds_weights(tmp_path: Path) -> None:
    config = small_config()
    client = local(config, tmp_path)
    with borrowed(client, "fine", device=CPU, fresh=True) as trainer:
        wanted = {name: tensor.clone() for name, tensor in trainer.weights().items()}
        for tensor in trainer.weights().values():
            tensor.zero_()
    with borrowed(client, "fine", device=CPU, fresh=True) as trainer:
        for name, tensor in trainer.weights().items():
            assert torch.equal(tensor, wanted[name])


def test_a_trainer_that_failed_is_not_lent_again(tmp_path: Path) -> None:
    config = small_config()
    client = local(config, tmp_path)
    with (
        pytest.raises(ZeroDivisionError),
        borrowed(client, "fine", device=CPU, fresh=False),
    ):
        raise ZeroDivisionError
    assert not workers._shelf


def test_writes_are_done_when_the_block_is_left() -> None:
    done = []

    def slowly() -> None:
        time.sleep(0.05)
        done.append(threading.current_thread())

    with WriteBehind() as write:
        write(slowly, num_bytes=10)
        assert done == []
    assert done[0] is not threading.current_thread()
    with WriteBehind() as write:
        write(slowly, num_bytes=workers.KEPT_BYTES + 1)  # large: at once, here
        assert done[1] is threading.current_thread()


def test_the_first_error_is_told() -> None:
    def full() -> None:
        raise StoreError("x: cannot be written: no space left on the device")

    with pytest.raises(StoreError, match="no space"), WriteBehind() as write:
        write(full, num_bytes=1)


def test_an_error_of_the_block_comes_before_those_of_its_writes() -> None:
    def work() -> None:
        with WriteBehind() as write:
            write(lambda: 1 // 0, num_bytes=1)  # type: ignore[arg-type]
            raise LookupError

    with pytest.raises(LookupError):
        work()
