"""The command in processes of its own that need not import torch each time: a server that has imported everything, and
trained nothing, forks one for each command. `tests/test_front_door.py` starts the command the ordinary way."""
import json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace as NS

root = Path(__file__).parents[1]

class Command:
    "A command that runs: the part of `subprocess.Popen` that the tests use"
    def __init__(self, ask, argv, cwd):
        self.ask, self.args, self.returncode, self.folder = ask, argv, None, tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name)/o for o in ('out', 'err'))
        self.pid = ask(argv=[*map(str, argv)], cwd=str(cwd), out=str(self.out), err=str(self.err), env=dict(os.environ))

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

    def start(self, *argv, cwd=root): return Command(self.ask, argv, cwd)

    def __call__(self, *argv, cwd):
        c = self.start(*argv, cwd=cwd)
        out, err = c.communicate()
        return NS(returncode=c.returncode, stdout=out, stderr=err, args=argv)

    def close(self):
        self.server.stdin.close()
        self.server.wait()

def run(task):
    "In the fork: the command, as `python -m asibkd.run.cli` runs it"
    import traceback
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a background shell hands Ctrl-C down as ignored
    os.chdir(task['cwd'])
    os.environ.clear()
    os.environ.update(task['env'])
    for number, file in ((0, os.devnull), (1, task['out']), (2, task['err'])):
        os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    from asibkd.run.cli import main
    sys.argv = ['asibkd', *task['argv']]
    try:
        code = main()
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
    import asibkd.run.commands, asibkd.run.experiment, asibkd.run.tasks, asibkd.run.doctor, asibkd.run.cl, asibkd.analysis.report
    import timm, torchvision, pandas, sklearn.datasets
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
