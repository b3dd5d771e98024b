"""Answers by vLLM, which runs in a process of its own: `python -m finetune.vllm_engine` takes and gives token ids.

In the job's process vLLM would keep its memory of the GPU after its engine is deleted (vllm-project/vllm#21073), and
the checks that follow need it. The first line on stdin is a `Start`, each further one a `Question`; each is answered by
one line on stdout. Written after the source of vLLM 0.33.0, and never run with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from finetune.backend import rank_limit
from finetune.evaluate import Answer, Decoding, planned
from finetune.launch import kill_session, started

log = logging.getLogger("finetune")

SHARE = 0.9  # of the memory that is free beside the job's own; the rest is for CUDA's context and torch's workspaces
END_SECONDS = 5.0  # for an idle engine to go; one that is at work is killed
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in one process: it dies with the job, and batches are scheduled alike
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Start(TypedDict):
    """The arguments of `vllm.LLM`, and where the adapter lies; None for the base itself."""

    llm: Mapping[str, Any]
    adapter: str | None


class Question(TypedDict):
    """Prompts of one batch, and the arguments of `vllm.SamplingParams`."""

    prompts: Sequence[Sequence[int]]
    sampling: Mapping[str, Any]


class Engine:
    """vLLM at work: started by the first question, ended by `close`."""

    def __init__(self, llm: Mapping[str, Any], *, adapter: Path | None) -> None:
        self.llm, self.adapter = llm, adapter
        self.process: subprocess.Popen[bytes] | None = None

    def predict(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[Answer]]:
        """As `evaluate.predict`. Raises RuntimeError, and the next call starts anew."""
        sampling = {
            "temperature": 0.0,
            "max_tokens": decoding.max_new_tokens,
            "stop_token_ids": list(decoding.end_ids),
            "ignore_eos": True,  # what the base's files call an end is none unless it is among `end_ids`
            "detokenize": False,
        }
        for numbers in planned(prompts, decoding.batch_rows):
            question: Question = {"prompts": [list(prompts[n]) for n in numbers], "sampling": sampling}
            try:
                if self.process is None:
                    self._start(decoding.batch_rows)
                said = self._ask(question)["answers"]
            except BaseException:
                self.close()
                raise
            yield [_answer(n, *one, ends=set(decoding.end_ids)) for n, one in zip(numbers, said, strict=True)]

    def close(self) -> None:
        """End the process and see it gone, and its memory with it."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        kill_session(process.pid)
        process.wait()

    def _start(self, batch_rows: int) -> None:
        words = [sys.executable, "-m", "finetune.vllm_engine"]
        self.process = started(words, ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        llm = {**self.llm, "max_num_seqs": batch_rows, **_lora(self.adapter)}
        began = time.perf_counter()
        version = self._ask(Start(llm=llm, adapter=str(self.adapter) if self.adapter else None))["version"]
        log.info("vLLM %s began in %.1f s", version, time.perf_counter() - began)

    def _ask(self, what: Start | Question) -> dict[str, Any]:
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # its end is seen below
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise RuntimeError(f"vLLM ended with status {self.process.wait()}; run.log has its last words")
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RuntimeError(f"vLLM's process said {line[:200]!r}") from None
        if "error" in said:
            raise RuntimeError(f"evaluate.backend=vllm: {said['error']}")
        return said


def _lora(adapter: Path | None) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that an adapter in PEFT's format needs."""
    if adapter is None:
        return {}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return {"enable_lora": True, "max_lora_rank": rank_limit(rank)}


def _answer(number: int, ids: Sequence[int], reason: str, *, ends: set[int]) -> Answer:
    """What vLLM said, without the end token."""
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended an answer for another reason than its end or its length: {reason}")
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return Answer(number, list(ids[:stop]), reason)


def main() -> None:
    """Serve one job until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        for said in _served():
            print(json.dumps(said), file=answers, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        sys.exit(1)


def _served() -> Iterator[dict[str, Any]]:
    """All that is known of vLLM's interface: an answer to each line of stdin."""
    import vllm
    from vllm.lora.request import LoRARequest

    start: Start = json.loads(sys.stdin.readline())
    engine = vllm.LLM(**start["llm"], **_memory())
    adapter = LoRARequest("adapter", 1, start["adapter"]) if start["adapter"] else None
    yield {"version": vllm.__version__}
    for line in sys.stdin:
        question: Question = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
        sampling = vllm.SamplingParams(**question["sampling"])
        found = [one.outputs[0] for one in engine.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)]
        yield {"answers": [(list(output.token_ids), output.finish_reason) for output in found]}


def _memory() -> dict[str, float]:
    """The share of the whole GPU that vLLM may take beside the job, which still holds its model."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": SHARE * free / total}


if __name__ == "__main__":
    main()
