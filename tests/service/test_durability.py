"""Acknowledged means on disk: the order of system calls, as the kernel saw them."""

import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest

PROGRAM = """
import sys
from pathlib import Path
from service.deeds import Deed
from service.storage import open_storage
from service.store import BatchRecord
from tests.service.test_store import A01, Change, NOW, control

storage = open_storage(Path(sys.argv[1]))
print("BEGIN", flush=True)
storage.of("t").commit(BatchRecord("P1"), Change(NOW, controls=[control(A01)]), Deed("t").done("test", "P1", {}))
print("ACKNOWLEDGED", flush=True)
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """System calls of one commit, in order: (name, the rest of the line)."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on this machine: the order of system calls is not looked at")
    folder = tmp_path_factory.mktemp("trace")
    trace = folder / "trace"
    watched = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat"
    command = [strace, "-f", "-y", "-s", "40", "-e", f"trace={watched}", "-o", trace]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, folder / "lab"], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0 and "ptrace" in done.stderr:
        pytest.skip("this machine lets nothing be traced: the order of system calls is not looked at")
    assert done.stdout == "BEGIN\nACKNOWLEDGED\n", done.stderr
    lines = [line.partition(" ")[2].strip() for line in trace.read_text().splitlines()]
    begin = next(number for number, line in enumerate(lines) if '"BEGIN' in line)
    return lines[begin:]


def position(calls, pattern, after=-1):
    """Where the first call that fits stands, after another."""
    return next(number for number, call in enumerate(calls) if number > after and re.search(pattern, call))


def test_a_blob_is_written_beside_synced_renamed_and_its_directory_synced_before_it_is_acknowledged(calls):
    opened = position(calls, r"openat\(.*blobs/partial/[0-9a-f]+.*O_CREAT")
    written = position(calls, r"write\(\d+<.*blobs/partial/", opened)
    synced = position(calls, r"fsync\(\d+<.*blobs/partial/[0-9a-f]+", written)
    renamed = position(calls, r"rename\w*\(.*blobs/partial/.*blobs/batches/t/[0-9a-f]+/", synced)
    directory = position(calls, r"fsync\(\d+<.*blobs/batches/t/[0-9a-f]+>", renamed)
    acknowledged = position(calls, r'write\(1<.*"ACKNOWLEDGED')
    assert directory < acknowledged


def test_every_new_directory_is_synced_into_the_one_above_before_anything_is_renamed_into_it(calls):
    renamed = position(calls, r"rename\w*\(.*blobs/batches/t/")
    levels = r"blobs", r"blobs/batches", r"blobs/batches/t", r"blobs/batches/t/[0-9a-f]+"
    for above, made in pairwise(levels):
        mkdir = position(calls, rf'mkdir\w*\(.*/{made}"')
        assert position(calls, rf"fsync\(\d+<[^>]*/{above}>", mkdir) < renamed


def test_the_record_that_names_a_blob_is_written_after_it_and_synced_before_it_is_acknowledged(calls):
    directory = position(calls, r"fsync\(\d+<.*blobs/batches/t/[0-9a-f]+>")
    written = position(calls, r"pwrite64\(\d+<.*records\.db-wal")
    synced = position(calls, r"f(data)?sync\(\d+<.*records\.db-wal", written)
    assert directory < written < synced < position(calls, r'write\(1<.*"ACKNOWLEDGED')
    last = max(number for number, call in enumerate(calls) if re.search(r"pwrite64\(\d+<.*records\.db-wal", call))
    assert position(calls, r"f(data)?sync\(\d+<.*records\.db-wal", last) < position(calls, r'write\(1<.*"ACKNOWLEDGED')
