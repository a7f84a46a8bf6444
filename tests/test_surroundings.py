"""What a user's machine, container or notebook is like: Pythons, homes, interrupted installations."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT, THIN, free_port, thin_driver, wait_for_port, wait_until

import nbclient
import nbformat
import pytest

# ---- make


@pytest.fixture
def make(tmp_path):
    """A function that runs make in a checkout that needs no package, with these programs as Pythons.

    It returns the exit status, and all that is said.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in "make", "sh", "touch", "rm":
        (programs / name).symlink_to(shutil.which(name))
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in "requirements.txt", "constraints.txt":
        (tmp_path / name).touch()
    (tmp_path / "requirements-dev.txt").write_text("-r missing.txt")
    (tmp_path / "demo.py").write_text("import sys; print('Demo of', sys.prefix)")

    def run(*arguments, **pythons):
        for name, line in pythons.items():
            (programs / name.replace("_", ".")).write_text(f"#!{programs}/sh\n{line}\n")
            (programs / name.replace("_", ".")).chmod(0o755)
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {"PATH": str(programs)}
        ended = subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, **output)
        return ended.returncode, ended.stdout

    return run


WORKS = f'exec {sys.executable} "$@"'
DOES_NOT = "echo 'The python3.11 command exists in these versions: 3.11.7' >&2; exit 127"
NO_VENV = f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'


def test_environment_that_is_not_whole_is_made_again(make, tmp_path):
    """First pip fails, then the Python that the environment was made of goes."""
    status, out = make("demo", python3_11=WORKS)
    assert status != 0 and "missing.txt" in out and "Demo" not in out
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    (tmp_path / "missing.txt").touch()
    made = f"\nDemo of {tmp_path}/.venv\n"
    status, out = make("demo")
    assert status == 0 and out.endswith(made) and "-m venv" in out
    status, out = make("demo")
    assert status == 0 and out.endswith(made) and "-m venv" not in out
    (tmp_path / ".venv" / "bin" / "python").unlink()
    status, out = make("demo")
    assert status == 0 and out.endswith(made) and "-m venv" in out


def test_make_takes_a_python_that_runs(make):
    status, out = make("-n", "demo")
    needed = "Python 3.11, 3.12 or 3.13 is needed, with its module venv: install one, or name it, as in"
    assert status == 2
    assert re.fullmatch(rf"Makefile:\d+: \*\*\* {needed} make PYTHON=\S+python3.12.  Stop.\n", out)
    for pythons, taken in (
        ({"python3_13": WORKS}, "python3.13"),
        ({"python3_11": DOES_NOT, "python3_12": NO_VENV}, "python3.13"),
        ({"python3_12": WORKS}, "python3.12"),
        ({"python3_11": WORKS}, "python3.11"),
    ):
        status, out = make("-n", "demo", **pythons)
        assert status == 0 and out.startswith(f"{taken} -m venv "), out
    status, out = make("-n", "demo", "PYTHON=/opt/python")
    assert status == 0 and out.startswith("/opt/python -m venv ")


# ---- containers

# A user without an entry in passwd, as in a container. It may read all: this may lie in root's home.
STRANGER = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
STRANGER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.fixture
def as_stranger(s3):
    """A function that runs a program as that user, in a folder that it may write to.

    It returns the exit status, output and errors. None for a variable means that there is none.
    """
    with tempfile.TemporaryDirectory() as folder:  # sockets want a short path
        Path(folder).chmod(0o777)

        def run(program, *arguments, **environment):
            here = os.environ | {"RAY_ADDRESS": "local", "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": None}
            here = {name: value for name, value in (here | environment).items() if value is not None}
            command = [*STRANGER, sys.executable, ROOT / program, *map(str, arguments)]
            output = {"capture_output": True, "text": True, "timeout": 200}
            ended = subprocess.run(command, cwd=folder, env=here, **output)
            return ended.returncode, ended.stdout, ended.stderr

        yield run


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.timeout(400)
def test_run_of_a_user_without_a_home(as_stranger, photos, bucket):
    """The home is unknown, that of most containers, or another's; of these two, Ray's start is seen."""
    places = ["--checkpoint-dir", "saved", "--export-dir", "network", "--log-dir", "curves"]
    flags = ["NUM_WORKERS=1", "--s3-bucket", photos, "--iterations", 1, *places]
    status, out, error = as_stranger("tests/thin_driver.py", *flags, HOME=None)
    assert (status, error) == (0, "")
    assert out.endswith(
        "Stopped at iteration 1: checkpoints in saved, network in network, curves in curves\n"
    )
    for home in "/", "/etc":
        status, _, error = as_stranger("driver.py", "--s3-bucket", bucket, HOME=home)
        assert status == 2 and error.startswith(f"error: s3://{bucket}"), error


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_must_be_writable_is_named(as_stranger):
    status, _, error = as_stranger("driver.py", "--s3-bucket", "~/photos", HOME=None)
    hint = "no such folder; name it by its full path"
    assert (status, error) == (2, f"error: --s3-bucket ~/photos: {hint}\n")
    status, _, error = as_stranger("driver.py", HOME=None, RAY_TMPDIR=None, TMPDIR="/etc")
    what = "error: Ray does not start here: [Errno 13] Permission denied: '/etc/ray'"
    hint = "in TMPDIR, name a folder with a short path that can be written"
    assert (status, error) == (2, f"{what}; {hint}\n")


# ---- a limit of memory

LIMIT = 6 * 10**9


@pytest.fixture
def limited():
    """What begins a command that has a limit of memory, and no limit of CPUs, as in a container."""
    roots = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of both versions of control groups
    root, file = next(filter(Path.exists, roots)), "memory.max"
    file = "memory.limit_in_bytes" if root == roots[0] else file
    group = root / f"test-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(LIMIT))
    except OSError:
        pytest.skip("this user may not make a control group")
    enter = f'echo $$ > {group}/cgroup.procs && mount --bind {group} {root} && exec "$@"'
    yield ["unshare", "--mount", "sh", "-c", enter, "sh"]
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.mark.timeout(300)
def test_workers_are_as_many_as_memory_is_for(limited, one_ray, photos):
    """Ray has 70% of a container's memory for tasks, and each worker takes one GB of them."""
    port, folder = free_port(), tempfile.mkdtemp()  # sockets want a short path
    start = ["ray", "start", "--head", "--num-cpus=8", f"--port={port}", f"--temp-dir={folder}"]
    start += ["--include-dashboard=false", "--object-store-memory=500000000", "--block"]
    ray = subprocess.Popen([*limited, str(Path(sys.executable).with_name(start[0])), *start[1:]])
    try:
        wait_for_port(port, ray)
        flags = ["NUM_WORKERS=None", "--s3-bucket", photos, "--iterations", 2]
        with thin_driver(*flags, address=f"127.0.0.1:{port}") as run:
            assert run.wait() == 0
            out = run.output()
    finally:
        ray.terminate()
        ray.wait(60)
        shutil.rmtree(folder)
    line = r"node \w{8} has memory for (\d) workers only, its CPUs are for 8; "
    [workers] = re.findall(f"^{line}a larger CPUS_PER_WORKER uses them$", out, re.M)
    assert 2 <= int(workers) <= 5
    assert f"\n{workers} workers; an iteration is {workers} mini-batches of 5 images" in out
    assert " lost" not in out


# ---- notebooks

FIRST_CELL = f"""
import sys
sys.path.append({str(ROOT)!r})
import driver
driver.LAYERS, driver.NUM_CLASSES, driver.PRECISION = {THIN}, 10, "float32"
driver.MINI_BATCH, driver.NUM_WORKERS = 5, 1
"""


class Interrupting(nbclient.NotebookClient):
    """Runs all cells of a notebook in a kernel; presses its button for an interrupt at a line."""

    def process_message(self, message, cell, cell_index):
        """Take what a cell says."""
        if "Iteration 1: loss" in message["content"].get("text", ""):
            asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, cell_index)


def run_all(*cells, folder):
    """Run the first cell, and these, as "run all" does: the error of the cell that ends it, and what
    each of these has said."""
    new_cell = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(cells=[new_cell(text) for text in (FIRST_CELL, *cells)])
    client = Interrupting(notebook, timeout=200, resources={"metadata": {"path": str(folder)}})
    with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
        client.execute()
    said = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells[1:]]
    return caught.value, said


@pytest.mark.timeout(400)
def test_notebook_stops_where_main_is_interrupted_or_has_an_error(s3, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    train = f"driver.main(['--s3-bucket', '{photos}', '--checkpoint-dir', 'saved'])"
    error, said = run_all(train, "print('all is well')", folder=tmp_path)
    assert error.ename == "KeyboardInterrupt" and said[1] == ""
    assert re.search(r"^Stopped at iteration [12]: checkpoints in saved\n", said[0], re.M)
    error, said = run_all(
        "driver.main(['--s3-bucket', '/no'])", "print('all is well')", folder=tmp_path
    )
    hint = "no such folder; name it by its full path"
    assert (error.ename, error.evalue) == ("InputError", f"--s3-bucket /no: {hint}")
    assert said[1] == ""
