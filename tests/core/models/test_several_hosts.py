"""Two processes with two devices each generate what one device generates."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT, ROOT = Path(__file__).with_name("one_host.py"), Path(__file__).parents[3]


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(number), port, str(ROOT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        printed = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], printed
    assert all("equal" in lines.splitlines() for lines in printed)
