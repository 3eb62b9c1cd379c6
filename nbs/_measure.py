"""How the book is doing, in numbers: `python nbs/_measure.py`, with file names: `python nbs/_measure.py -v`.

Plain standard library. `tests/test_house.py` holds the bounds.
"""
import ast, base64, io, json, re, sys, tokenize
from pathlib import Path
from statistics import median

here = Path(__file__).resolve().parent
EXPORT = re.compile(r'\s*#\|\s*export\b')
HIDDEN = re.compile(r'\s*#\|\s*(export|hide|default_exp)\b', re.M)
SKIPPED = re.compile(r'^\s*#\|\s*(slow|cuda|download|eval\s*:\s*false)', re.M | re.I)
BAD_OUTPUT = {
    'path': re.compile(r'(?<![\w.])/(?:tmp|home|root|work|Users|var|usr|private)/[\w.-]+|[A-Z]:\\\\'),
    'memory address': re.compile(r'\bat 0x[0-9a-f]{6,}|object at 0x'),
    'clock time': re.compile(r'\b\d{1,2}:\d{2}:\d{2}\b|\b20\d\d-\d\d-\d\d\b'),
    'warning': re.compile(r'\b\w*Warning:'),
    'traceback': re.compile(r'Traceback \(most recent call last\)'),
    'progress bar': re.compile(r'\d+%\|[█▏▎▍▌▋▊▉ #-]*\|'),
}

def chapters():
    "The numbered notebooks, in reading order"
    every = (f for f in here.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
    return sorted(f for f in every if re.match(r'\d\d_', f.relative_to(here).parts[0]))

def pages():
    "The notebooks beside the chapters: README, doors, how-tos"
    return sorted(here.glob('[a-z]*.ipynb'))

def name(f):
    return f.relative_to(here).as_posix()

def cells(f):
    return json.loads(f.read_text(encoding='utf-8'))['cells']

def source(cell):
    return ''.join(cell['source'])

def is_code(cell):
    return cell['cell_type'] == 'code'

def python(src):
    "Without magics, so that it parses"
    return '\n'.join('' if o.lstrip().startswith(('%', '!')) else o for o in src.splitlines())

def exported(f):
    return [source(c) for c in cells(f) if is_code(c) and EXPORT.match(source(c))]

def visible(f):
    "The cells a reader sees that define nothing of the package"
    return [c for c in cells(f) if is_code(c) and not HIDDEN.search(source(c)) and not SKIPPED.search(source(c))]

def definitions(src):
    return [n for n in ast.parse(python(src)).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

def length(src):
    "Lines of a defining cell, directives and blank lines aside"
    return sum(bool(o.strip()) and not o.startswith('#|') for o in src.splitlines())

def semicolons(src):
    "Lines with a second statement after `;`"
    tokens = list(tokenize.generate_tokens(io.StringIO(python(src)).readline))
    return {t.start[0] for t, u in zip(tokens, tokens[1:])
            if t.type == tokenize.OP and t.string == ';' and u.type not in (tokenize.NEWLINE, tokenize.COMMENT, tokenize.NL)}

def undocumented(src):
    "Public functions, classes and methods without a docstring"
    out = []
    for n in definitions(src):
        is_patch = any('patch' in ast.unparse(d) for d in n.decorator_list)
        if not n.name.startswith('_') and not ast.get_docstring(n) and not is_patch:
            out.append(n.name)
    return out

def pictures(f):
    "Sizes in bytes of the pictures stored in a notebook"
    sizes = []
    for c in cells(f):
        for o in c.get('outputs', []):
            for k, v in o.get('data', {}).items():
                if k.startswith('image/'):
                    text = ''.join(v)
                    sizes.append(len(text) if 'svg' in k else len(base64.b64decode(text)))
        if not is_code(c) and re.search(r'!\[.*?\]\(|<img |<svg', source(c)):
            sizes.append(0)
    return sizes

def output_text(cell):
    "Everything a cell's outputs say"
    said = []
    for o in cell.get('outputs', []):
        said.append(''.join(o.get('text', '')))
        said += [''.join(v) for k, v in o.get('data', {}).items() if k.startswith('text/')]
        said += o.get('traceback', [])
    return '\n'.join(said)

def bad_outputs(f):
    "What no stored output may contain"
    found = []
    for c in cells(f):
        text = output_text(c)
        found += [f'{name(f)}: {what} in an output: {m[0]!r}' for what, r in BAD_OUTPUT.items() if (m := r.search(text))]
        found += [f'{name(f)}: a cell stores its log' for o in c.get('outputs', []) if o.get('name') == 'stderr']
        found += [f'{name(f)}: an error is stored' for o in c.get('outputs', []) if o['output_type'] == 'error']
    return found

def ends_in_a_value(src):
    "Is the last line an expression that a notebook shows?"
    if src.rstrip().endswith(';'):
        return False
    try:
        body = ast.parse(python(src)).body
    except SyntaxError:
        return False
    if not body or not isinstance(body[-1], ast.Expr):
        return False
    call = body[-1].value
    quiet = ('test_', 'assert', 'expect_', 'log.', 'nn.init', 'torch.manual_seed')
    return not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith(quiet)) and not isinstance(call, ast.Constant)

def wing(module):
    return module.split('.')[0]

def modules():
    "Module → its notebook"
    out = {}
    for f in chapters():
        m = next((re.search(r'#\|\s*default_exp ([\w.]+)', source(c)) for c in cells(f) if '#| default_exp' in source(c)), None)
        if m:
            out[m[1]] = f
    return out

def imports(src, known):
    "(module of the package, imported by star?) for every import in a piece of source"
    for node in ast.walk(ast.parse(python(src))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'asibkd':
            base = '.'.join(node.module.split('.')[1:])
            for a in node.names:
                longer = f'{base}.{a.name}'.strip('.')
                yield (longer if longer in known else base), a.name == '*'
        if isinstance(node, ast.Import):
            yield from ((a.name.removeprefix('asibkd.'), False) for a in node.names if a.name.startswith('asibkd.'))

def graph():
    "Module → the modules its notebook imports (tests and demos included)"
    known = modules()
    return {m: {o for c in cells(f) if is_code(c) for o, _ in imports(source(c), known) if o in known and o != m} for m, f in known.items()}

def upward():
    "Imports of what does not stand below"
    known = modules()
    order = {m: i for i, m in enumerate(known)}
    bad = [f'{m} imports {o}' for m, others in graph().items() for o in others if order[o] >= order[m]]
    return bad + [f'{m}: star import' for m, f in known.items() for c in cells(f) if is_code(c)
                  for _, star in imports(source(c), known) if star]

def shown_soon(f):
    "Names of defining cells that no visible or test cell follows within three cells"
    cs = cells(f)
    out = []
    for i, c in enumerate(cs):
        if is_code(c) and EXPORT.match(source(c)) and definitions(source(c)):
            after = [o for o in cs[i + 1:i + 4] if is_code(o) and not EXPORT.match(source(o))]
            if not after:
                out.append(f'{name(f)}: {definitions(source(c))[0].name}')
    return out

def measure():
    "Every number, and what breaks a bound, by name"
    files = chapters()
    defining = [(f, s) for f in files for s in exported(f) if definitions(s)]
    sizes = sorted(length(s) for _, s in defining)
    demos = {f: visible(f) for f in files}
    shown = {f: sum(bool(c.get('outputs')) for c in v) for f, v in demos.items()}
    lines = [(f, o) for f in files for s in exported(f) for o in s.splitlines()]
    return dict(
        notebooks=len(files), wings=len({wing(m) for m in modules()}), defining_cells=len(defining), median=median(sizes),
        p90=sizes[int(.9*(len(sizes) - 1))], longest=sizes[-1],
        long_cells=[f'{name(f)}: {definitions(s)[0].name} {length(s)}' for f, s in defining if length(s) > 45],
        crowded=[f'{name(f)}: {", ".join(n.name for n in definitions(s))}' for f, s in defining if len(definitions(s)) > 1],
        wide=[f'{name(f)}: {o[:90]}' for f, o in lines if len(o) > 120],
        second_statements=[f'{name(f)}: {s.splitlines()[i - 1].strip()[:90]}' for f in files for s in exported(f) for i in sorted(semicolons(s))],
        demo_cells=sum(map(len, demos.values())), demo_cells_shown=sum(shown.values()),
        blank=[f'{name(f)}: {source(c).splitlines()[-1][:90]}' for f, v in demos.items() for c in v
               if not c.get('outputs') and ends_in_a_value(source(c))],
        little_shown=[f'{name(f)}: {shown[f]} of {len(v)}' for f, v in demos.items() if shown[f] < .5*len(v)],
        with_picture=sum(bool(pictures(f)) for f in files), without_picture=[name(f) for f in files if not pictures(f)],
        large_pictures=[f'{name(f)}: {s/1000:.0f} kB' for f in files for s in pictures(f) if s > 40_000],
        undocumented=[f'{name(f)}: {n}' for f, s in defining for n in undocumented(s)],
        bad_outputs=[o for f in [*files, *pages()] for o in bad_outputs(f)], upward=upward(), not_shown=[o for f in files for o in shown_soon(f)],
        long_notebooks=[f'{name(f)}: {len(cells(f))} cells' for f in files if len(cells(f)) > 90],
        large_notebooks=[f'{name(f)}: {f.stat().st_size/1000:.0f} kB' for f in files if f.stat().st_size > 400_000],
        long_prose=[f'{name(f)}: {len(source(c).split())} words: {source(c)[:50]!r}' for f in files for c in cells(f)
                    if not is_code(c) and len(re.sub(r'\|.*\|', '', source(c)).split()) > 80],
        long_demos=[f'{name(f)}: {length(source(c))}: {source(c).splitlines()[0][:60]}' for f, v in demos.items() for c in v if length(source(c)) > 12],
    )

def report(m, verbose=False):
    "The numbers as lines"
    share = 100*m['demo_cells_shown']/max(m['demo_cells'], 1)
    print(f"{m['notebooks']} numbered notebooks in {m['wings']} wings; imports that break the law: {len(m['upward'])}")
    print(f"{m['defining_cells']} defining cells: median {m['median']:g} lines, nine in ten at most {m['p90']}, longest {m['longest']}")
    print(f"visible demo cells with a stored output: {m['demo_cells_shown']} of {m['demo_cells']} ({share:.0f} %)")
    print(f"notebooks with a picture: {m['with_picture']}")
    for k, v in m.items():
        if isinstance(v, list):
            print(f"{k.replace('_', ' ')}: {len(v)}")
            for o in v if verbose else []:
                print('   ', o)

if __name__ == '__main__':
    report(measure(), '-v' in sys.argv)
