"""`rmsprop check`: what RMSprop runs on here."""

import platform

import typer


def check() -> None:
    """Say what RMSprop runs on here: versions, devices, and for each kind of tensor which backend steps it and why.

    A backend that is missing something says what, and how to get it.

    Examples:

    rmsprop check
    """
    import torch

    from rmsprop import __version__
    from rmsprop.optimizer import RMSprop

    typer.echo(f"rmsprop {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    typer.echo(f"{torch.get_num_threads()} threads, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
            weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
            _, *lines = RMSprop([weight]).explain().splitlines()
            typer.echo(f"{device}, {str(dtype).removeprefix('torch.')}")
            typer.echo("\n".join(f"    {line.strip()}" for line in lines if line.startswith("        ")))
