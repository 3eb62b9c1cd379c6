"What is at full length only in the tests that are about it"
import sys
from copy import deepcopy
from functools import lru_cache, partial

@lru_cache
def digits(read): return read()     # 1,797 lines of text

def shorten(put):
    """`put(module, name, value)`: the fusion of a run takes 20 steps of 150, its regression one penalty of six, a latency three
    passes; an analytic teacher has few features"""
    from asibkd.distil import fusion
    from asibkd.models import teachers, trunks
    from asibkd.trainers import casts, fusing
    latency = teachers.latency_ms
    for module in (fusing, casts): put(module, 'fit_path', partial(module.fit_path, steps=20))
    put(fusion, 'RIDGES', (.01,))
    if sets := sys.modules.get('sklearn.datasets'):     # not imported for a test that needs none
        put(sets, 'load_digits', lambda read=sets.load_digits: deepcopy(digits(read)))
    put(trunks, 'FEATURES', dict(random=100, kmeans=20))
    put(teachers, 'latency_ms', lambda net, x, repeats: latency(net, x, 3))

def digits_with_few_tests(put, images):
    "`put(dict, key, value)`: the digits with as many test images"
    import torch
    from asibkd.data.catalogue import datasets
    real = datasets['digits']
    def few(cfg):
        d = real(cfg)
        first = torch.cat([(d['test'].y == c).nonzero()[:images//10, 0] for c in range(10)])
        return d | dict(test=d['test'].subset(first.sort().values))
    put(datasets, 'digits', few)
