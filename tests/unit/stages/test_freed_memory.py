from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, for it can't be taken back. Eight requests in a thread, each of which
# makes and frees 16 MiB; the first one may fault pages in.
PROGRAM = """
import resource, sys, threading
from stages.freed_memory import keep_freed_memory

if not keep_freed_memory():
    sys.exit(3)
faults = []

def answer_requests():
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        rows = [bytearray(2 << 20) for _ in range(8)]
        del rows
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

thread = threading.Thread(target=answer_requests)
thread.start()
thread.join()
print(max(faults[1:]))
"""


def test_a_request_faults_no_memory_in_that_the_one_before_freed():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if ran.returncode == 3:
        pytest.skip("this C library has no mallopt")
    assert ran.returncode == 0, ran.stderr
    pages_of_a_request = (16 << 20) // 4096
    assert int(ran.stdout) < pages_of_a_request // 10
