"""The command in processes of its own that need not import torch each time: a server that has imported everything, and
trained nothing, forks one for each command. `tests/test_front_door.py` starts the command the ordinary way. A notebook
with papermill's parameters is run in the same way; `tests/test_door.py` has the true papermill."""
import json, os, resource, signal, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace as NS

root = Path(__file__).parents[1]

class Command:
    "A command that runs: the part of `subprocess.Popen` that the tests use"
    def __init__(self, ask, argv, cwd, **how):
        self.ask, self.args, self.returncode, self.folder = ask, argv, None, tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name)/o for o in ('out', 'err'))
        self.pid = ask(argv=[*map(str, argv)], cwd=str(cwd), out=str(self.out), err=str(self.err), env=dict(os.environ), **how)

    def poll(self):
        if self.returncode is None: self.returncode = self.ask(pid=self.pid)
        return self.returncode

    def send_signal(self, how):
        if self.poll() is None: os.kill(self.pid, how)

    def communicate(self, timeout=600):
        "What it printed: (stdout, stderr)"
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f'{self.args} took over {timeout} s')
            time.sleep(.02)
        return self.out.read_text(), self.err.read_text()

class Door:
    "One server for each worker of pytest"
    def __init__(self):
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(root)})

    def ask(self, **task):
        self.server.stdin.write(json.dumps(task) + '\n')
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *argv, cwd=root, **how):
        "`largest`: bytes of the largest file that can be written; `notebook`: (in, out), with papermill's `-p` in `argv`"
        return Command(self.ask, argv, cwd, **how)

    def __call__(self, *argv, cwd, **how):
        c = self.start(*argv, cwd=cwd, **how)
        out, err = c.communicate()
        return NS(returncode=c.returncode, stdout=out, stderr=err, args=argv)

    def close(self):
        self.server.stdin.close()
        self.server.wait()

def run_notebook(path, out, argv):
    "As `papermill path out -p name value …` does, in an IPython of this process"
    import nbformat
    from execnb.nbio import dict2nb, write_nb
    from execnb.shell import CaptureShell
    from papermill.cli import _resolve_type
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    given = {k: _resolve_type(v) for flag, k, v in zip(*[iter(argv)]*3, strict=True)}
    nb = dict2nb(json.loads(nbformat.writes(parameterize_notebook(load_notebook_node(path), given))))
    shell = CaptureShell()
    try: shell.run_all(nb, exc_stop=True)
    except Exception: print(shell.prettytb(fname=path), file=sys.stderr)
    write_nb(nb, out)
    return int(bool(shell.exc))

def run(task):
    "In the fork: the command, as `python -m asibkd.run.cli` runs it"
    import traceback
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a background shell hands Ctrl-C down as ignored
    os.chdir(task['cwd'])
    if 'largest' in task:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task['largest'],)*2)
    os.environ.clear()
    os.environ.update(task['env'])
    for number, file in ((0, os.devnull), (1, task['out']), (2, task['err'])):
        os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    from asibkd.run.cli import main
    sys.argv = ['asibkd', *task['argv']]
    try:
        code = run_notebook(*task['notebook'], task['argv']) if 'notebook' in task else main()
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

def serve():
    import asibkd.run.commands, asibkd.run.experiment, asibkd.run.loops, asibkd.run.tasks, asibkd.run.doctor, asibkd.run.cl, asibkd.analysis.report
    import accelerate, execnb.shell, jinja2, matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, pandas, papermill, sklearn.datasets, sklearn.metrics, timm.scheduler, torchvision
    import torch._dynamo, torch._inductor.config       # torch itself imports them with the first optimiser
    from _short import shorten
    shorten(setattr)
    os.fsync = lambda file: None          # as in conftest.py
    sys.path[0] = ''                      # as `python -m` has it: the folder of the command
    answers = os.fdopen(os.dup(1), 'w')   # what a command prints must not come in between
    for line in sys.stdin:
        task = json.loads(line)
        if 'pid' in task:
            pid, status = os.waitpid(task['pid'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer: run(task)
        answers.write(json.dumps(answer) + '\n')
        answers.flush()

if __name__ == '__main__':
    serve()
