import errno
import os
import signal
import subprocess
import sys

import pytest

from fused_arcface.base import files

# The module alone, in a process of its own that starts at once: it imports nothing of the package.
_ALONE = f"""
import os, resource, runpy, signal, sys
from types import SimpleNamespace
files = SimpleNamespace(**runpy.run_path({files.__file__!r}))
"""


def run_alone(code, *arguments, **options):
    command = [sys.executable, "-c", _ALONE + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_text_is_utf8_in_every_locale(tmp_path):
    path = tmp_path / "names.txt"
    name = os.fsdecode(b"\xff\xe9")  # a folder's name that is no UTF-8
    files.write_text(path, f"许\r\n{name}\u2028\n")
    assert path.read_bytes() == "许\r\n".encode() + b"\xff\xe9" + "\u2028\n".encode()
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run_alone("files.write_text(sys.argv[1], chr(0x8BB8))", path, env=environment, check=True)
    assert path.read_bytes() == "许".encode()


def test_permissions_and_links_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    files.write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o640
    umask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "fresh", "")
    finally:
        os.umask(umask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "made")
    files.write_text(dangling, "x")
    assert dangling.is_symlink() and (tmp_path / "made").read_text() == "x"


def test_a_device_is_written_and_not_replaced():
    assert run_alone("files.write_text('/dev/stdout', 'figures')", check=True).stdout == "figures"
    files.write_text("/dev/null", "x")
    assert not os.path.isfile("/dev/null")


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write_text(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_the_old_content_stays_alone(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        files.write_text(tmp_path / "none" / "x", "")
    assert raised.value.filename == str(tmp_path / "none" / "x")
    assert str(raised.value) == f"[Errno {errno.ENOENT}] {os.strerror(errno.ENOENT)}: {str(tmp_path / 'none' / 'x')!r}"
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left"):
            files.write_text("/dev/full", "x")


_FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    files.write_bytes(sys.argv[1], bytes(200_000))
except OSError as error:
    print(error.errno, error.filename, sep="\\n")
"""


def test_a_full_disk_leaves_the_old_content(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    done = run_alone(_FULL_DISK, path, check=True)
    assert done.stdout.splitlines() == [str(errno.EFBIG), str(path)]
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


# Kills itself before the call to the operating system that the last argument counts: open
# what another writer left, sync, replace, open the folder, sync.
_KILLED = """
left = [int(sys.argv[2])]
def counted(call):
    def count(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return count
for name in ("fsync", "replace", "open"):
    setattr(os, name, counted(getattr(os, name)))
files.write_bytes(sys.argv[1], b"n" * 100_000)
"""


def test_a_kill_leaves_the_old_content_or_the_new(tmp_path):
    found = []
    for call in range(1, 7):
        path = tmp_path / str(call) / "x"
        path.parent.mkdir()
        path.write_text("old")
        done = run_alone(_KILLED, path, call, check=False)
        assert done.returncode in (0, -signal.SIGKILL)
        found.append((path.read_bytes()[:3].decode(), done.returncode == 0))
    # Before the open, the sync and the replacement; then before the folder is opened and synced; then never.
    assert found == [*[("old", False)] * 3, *[("nnn", False)] * 2, ("nnn", True)]


def test_the_file_of_a_killed_writer_goes_with_the_next(tmp_path):
    path = tmp_path / "x"
    for _ in range(3):
        run_alone(_KILLED, path, 2, check=False)
        assert len(os.listdir(tmp_path)) == 1  # the same one, not one more
    outside = tmp_path / "outside"
    files.write_text(path, "new")
    assert os.listdir(tmp_path) == ["x"]
    run_alone(_KILLED, path, 2, check=False)
    (left,) = tmp_path.glob(".partial-*")
    left.unlink()
    left.symlink_to(outside)  # made by a stranger
    files.write_text(path, "newer")
    assert path.read_text() == "newer" and not outside.exists() and left.is_symlink()


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "x"
    with files.replacing(path) as first:
        with files.replacing(path) as second, files.replacing(tmp_path / "y"):
            first.write(b"first")
            second.write(b"second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and sorted(os.listdir(tmp_path)) == ["x", "y"]


@pytest.mark.slow
def test_many_processes_write_a_file_at_the_same_time(tmp_path):
    path = tmp_path / "x"
    code = "for i in range(300): files.write_bytes(sys.argv[1], sys.argv[2].encode() * 1000)"
    command = [sys.executable, "-c", _ALONE + code, str(path)]
    writers = [subprocess.Popen([*command, letter]) for letter in "abcd"]
    assert [each.wait() for each in writers] == [0, 0, 0, 0]
    content = path.read_text()
    assert len(content) == 1000 and len(set(content)) == 1 and os.listdir(tmp_path) == ["x"]
