"""Each function of numbers called once, while one thread imports this, so that no thread of a job is the first.

oneMKL before 2025, which computes them in torch's builds for x86, finds a function's code when it is first called. Of
threads that call at the same moment one may get code that is right to 1e-9 at best, for that call alone
(https://github.com/pytorch/pytorch/issues/188792). A module that calls one of them imports this one.
"""

import torch

FUNCTIONS = (
    torch.sqrt, torch.exp, torch.exp2, torch.expm1, torch.log, torch.log2, torch.log10, torch.log1p,
    torch.sin, torch.cos, torch.tan, torch.tanh, torch.erf, torch.erfc,
)  # fmt: skip

for dtype in (torch.float32, torch.float64):
    for function in FUNCTIONS:
        function(torch.ones(1, dtype=dtype, device="cpu"))
