"What is at full length only in the tests that are about it"

def shorten(put):
    """`put(module, name, value)`: the fusion of a run takes 20 steps of 150, its regression one penalty of six, a latency three
    passes; an analytic teacher has few features"""
    from functools import partial
    from asibkd.distil import fusion
    from asibkd.models import teachers, trunks
    from asibkd.trainers import fusing
    latency = teachers.latency_ms
    put(fusing, 'fit_path', partial(fusing.fit_path, steps=20))
    put(fusion, 'RIDGES', (.01,))
    put(trunks, 'FEATURES', dict(random=100, kmeans=20))
    put(teachers, 'latency_ms', lambda net, x, repeats: latency(net, x, 3))
