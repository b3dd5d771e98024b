"""`python -m slow_jobs`: the jobs of `finetune.worker`, slowed down so that a test finds them at work.

Reads {"run", "ranks", "slow", "room", "narrow"} lines, answers with the jobs' process ids, then with their exit statuses. `slow`
are seconds that each training step and each answered batch takes more; `room` is how many rows fit into memory when
they are answered, `narrow` how many tokens when they are trained on.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import peft.tuners.lora  # noqa: F401
import torch
import transformers
import transformers.models.qwen2.modeling_qwen2

from finetune import worker
from finetune.launch import die_with_parent
from finetune.scores.segment import segment


def slow_down(run, *, slow, room, narrow):
    """Every base that is loaded from now on takes its time."""
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def wait(module, args, kwargs):
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if module.training:
            if narrow and ids.numel() > narrow:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if not (run / "steps.jsonl").exists():
                print("in the first step", flush=True)
            time.sleep(slow)
        elif cache is not None and not cache.get_seq_length() and (run / "adapter").exists():
            time.sleep(slow)
            if room and len(ids) > room and not (run / "predictions.jsonl").exists():
                raise torch.OutOfMemoryError("CUDA out of memory")
        elif (run / "predictions.jsonl").exists():
            time.sleep(slow)

    def slowed(*args, **kwargs):
        found = plain(*args, **kwargs)
        found[0].register_forward_pre_hook(wait, with_kwargs=True)
        return found

    transformers.AutoModelForCausalLM.from_pretrained = slowed


def start(job, *, rank, port):
    """Fork one rank of a job; its process id."""
    here = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with_parent(here)
        if job["ranks"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        slow_down(Path(job["run"]), slow=job["slow"], room=job["room"], narrow=job["narrow"])
        worker.become(Path(job["run"]), threads=1)
    return pid


def main():
    segment("词典")  # is read once, not by every job
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [start(job, rank=rank, port=port) for rank in range(job["ranks"])]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
