"""A worker's imports leave the compiler to whoever calls it."""

import subprocess
import sys
from functools import partial

import torch

from finetune.serve import _compiling_later


def test_functions_are_compiled_when_they_are_called_first(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return partial(function, 1)

    monkeypatch.setattr(torch, "compile", compile_now)
    with _compiling_later():
        plain = torch.compile(lambda a, b: a + b, dynamic=True)

        @torch.compile(fullgraph=True)
        def decorated(a, b):
            return a * b

    assert torch.compile is compile_now
    assert not compiled
    assert (plain(2), plain(3), decorated(5)) == (3, 4, 5)
    assert compiled == [{"dynamic": True}, {"fullgraph": True}]


def test_a_worker_imports_no_compiler():
    program = (
        "import sys\n"
        "from finetune import serve\n"
        "with serve._compiling_later():\n"
        "    import bitsandbytes\n"
        "from finetune import worker\n"
        "sys.exit('torch._inductor.lowering' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
