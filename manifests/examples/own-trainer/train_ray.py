"""A trainer of your own that launches through Ray: Ray Train starts a worker for each device of the pod, and each runs
the script beside this one. The contract is kept here, in the process that the pod started.

SIGTERM reaches this process. Ray would end its workers at once, so it is passed to them as a file that each looks for
after every step.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

SCRIPTS = Path(__file__).parent
DEVICES = int(os.environ["FINETUNE_DEVICES"])
PREEMPTED = 75


def worker(settings: dict) -> None:
    """One training process; Ray has set RANK, WORLD_SIZE and MASTER_ADDR for torch."""
    sys.path.insert(0, settings["scripts"])
    import train_trl

    code = train_trl.train(Path(settings["stop"]).exists)
    Path(settings["stop"]).with_name("code").write_text(str(code))


def main() -> int:
    folder = Path(tempfile.mkdtemp())
    stop = folder / "stop"
    signal.signal(signal.SIGTERM, lambda number, frame: stop.touch())
    ray.init(num_cpus=DEVICES, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=str(folder / "ray"))
    signal.signal(signal.SIGTERM, lambda number, frame: stop.touch())  # ray.init has put up its own
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        worker,
        train_loop_config={"scripts": str(SCRIPTS), "stop": str(stop)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=DEVICES, use_gpu=gpus),
        run_config=RunConfig(storage_path=str(folder / "results")),
    )
    trainer.fit()
    return int((folder / "code").read_text())


if __name__ == "__main__":
    sys.exit(main())
