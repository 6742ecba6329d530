"Files of an attacker: kind of file -> name -> function (kind, path, good bytes) that returns the bad bytes"

import io
import json
import math
import pickle
import struct
import zipfile

import fuzz
import numpy as np
import torch
from safetensors.torch import save

NESTED = '[' * 100_000 + ']' * 100_000


class Call:
    "An object that calls a function when it is unpickled"

    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def raw(head, data=b''):
    "A safetensors file with any header"
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack('<Q', len(head)) + head + data


def entry(shape=(1,), dtype='F32', at=(0, 4)):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(at)}


HEADERS = {
    'nothing': b'',
    'a header of nothing': struct.pack('<Q', 0),
    'a header that is longer than the file': struct.pack('<Q', 2**40) + b'{}',
    'a header of 2^63 bytes': struct.pack('<Q', 2**63) + b'{}',
    'no json': raw(b'\x00' * 100),
    'a list': raw([]),
    'nested': raw(b'{"a":' + NESTED.encode() + b'}'),
    'no utf-8': raw(b'{"\xff":1}'),
    'a name twice': raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    'tensors that overlap': raw({'a': entry(), 'b': entry()}, bytes(4)),
    'a gap': raw({'a': entry(), 'b': entry(at=(8, 12))}, bytes(12)),
    'bytes behind': raw({'a': entry()}, bytes(400)),
    'bytes missing': raw({'a': entry((1000,), at=(0, 4000))}, bytes(4)),
    'a negative shape': raw({'a': entry((-1,))}, bytes(4)),
    'a shape of bools': raw({'a': entry((True,))}, bytes(4)),
    'a shape of fractions': raw({'a': entry((1.0,))}, bytes(4)),
    'a shape of strings': raw({'a': entry(('1',))}, bytes(4)),
    'a shape that overflows': raw({'a': entry((2**40, 2**40))}, bytes(4)),
    'a shape that overflows to 0': raw({'a': entry((2**32, 2**32), at=(0, 0))}),
    'nothing, 2^63 times': raw({'a': entry((0, 2**63), at=(0, 0))}),
    'nothing, 2^40 times 2^40 times': raw({'a': entry((0, 2**40, 2**40), at=(0, 0))}),
    'many dimensions': raw({'a': entry((1,) * 100_000)}, bytes(4)),
    'negative places': raw({'a': entry(at=(-4, 0))}, bytes(4)),
    'places of bools': raw({'a': entry((0,), at=(False, False))}),
    'an unknown type': raw({'a': entry(dtype='F5')}, bytes(4)),
    'a type that is a number': raw({'a': entry(dtype=3)}, bytes(4)),
    'a tensor that is null': raw({'a': None}),
    'a tensor that is a list': raw({'a': [1]}),
    'metadata that are a list': raw({'__metadata__': []}),
    'metadata that are numbers': raw({'__metadata__': {'format': 3}}),
    'a name that is no text': raw(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), bytes(4)),
    'bools of 7': raw({'a': entry((4,), 'BOOL')}, b'\x07' * 4),
    '30,000 tensors of nothing': raw({f'{i:x}': entry((0,), at=(0, 0)) for i in range(30_000)}),
    'nan': raw(b'{"a":NaN}'),
    'a whole number of 5,000 digits': raw(b'{"a":' + b'9' * 5000 + b'}'),
}


def edited(**meta):
    "The good file with other metadata and the right checksum; None removes a value, a function changes it"

    def make(kind, path, data):
        tensors, old = fuzz.split(data)
        new = {k: v(old[k]) if callable(v) else v for k, v in meta.items()}
        return fuzz.sealed(tensors, {k: v for k, v in (old | new).items() if v is not None})

    return make


def retensored(**new):
    "The good file with other tensors; None removes one; '_' in names stands for a blank"

    def make(kind, path, data):
        tensors, meta = fuzz.split(data)
        tensors |= {k.replace('_', ' '): v for k, v in new.items()}
        return fuzz.sealed({k: v for k, v in tensors.items() if v is not None}, meta)

    return make


def sparse(names, story, tensors):
    return lambda *_: fuzz.sealed(
        tensors, {'format': 'fastprune sparse state', 'names': json.dumps(names), 'tensors': json.dumps(story)}
    )


def packed(n):
    return torch.zeros((n + 7) // 8, dtype=torch.uint8)


def told(shape, **more):
    return {'shape': shape, 'dtype': 'float32', 'mask': False, **more}


ONE = {'values w': torch.ones(1), 'bits w': torch.tensor([128], dtype=torch.uint8)}
NONE = {'values w': torch.zeros(0), 'bits w': torch.zeros(0, dtype=torch.uint8)}

SPARSE = {
    'a name 200,000 times': sparse(['w'] * 200_000, {}, {'dense w': torch.ones(2)}),
    '50,000 names of one tensor': sparse(
        ['w', *(f'{i}' for i in range(50_000))],
        {f'{i}': {'as': 'w'} for i in range(50_000)},
        {'dense w': torch.ones(9999)},
    ),
    'names that are numbers': sparse([1], {}, {'dense 1': torch.ones(1)}),
    'names that are a dict': sparse({'w': 1}, {}, {'dense w': torch.ones(1)}),
    'a name of itself': sparse(['w'], {'w': {'as': 'w'}}, {}),
    'names of each other': sparse(['v', 'w'], {'w': {'as': 'v'}, 'v': {'as': 'w'}}, {}),
    'a name of nothing': sparse(['w'], {'w': {'as': 'x'}}, {}),
    'a name of a list': sparse(['w'], {'w': {'as': ['w']}}, {}),
    'a story that is a list': sparse(['w'], {'w': [1]}, ONE),
    'a shape that is too large': sparse(['w'], {'w': told([10**6, 10**6])}, ONE),
    'a shape that overflows': sparse(['w'], {'w': told([2**32, 2**32])}, NONE),
    'nothing, 2^62 times': sparse(['w'], {'w': told([0, 2**62, 2**62])}, NONE),
    'a shape of bools': sparse(['w'], {'w': told([True, True])}, ONE),
    'a negative shape': sparse(['w'], {'w': told([-1, -1])}, ONE),
    'a shape that is a string': sparse(['w'], {'w': told('11')}, ONE),
    'many dimensions': sparse(['w'], {'w': told([1] * 65)}, ONE),
    'an unknown type': sparse(['w'], {'w': told([1], dtype='object')}, ONE),
    'a type that is a list': sparse(['w'], {'w': told([1], dtype=[])}, ONE),
    'too few values': sparse(
        ['w'], {'w': told([8])}, {'values w': torch.ones(3), 'bits w': torch.tensor([255], dtype=torch.uint8)}
    ),
    'values that are whole numbers': sparse(
        ['w'], {'w': told([1])}, {**ONE, 'values w': torch.ones(1, dtype=torch.int64)}
    ),
    'values that are a matrix': sparse(['w'], {'w': told([1])}, {**ONE, 'values w': torch.ones(1, 1)}),
    'bits that are floats': sparse(['w'], {'w': told([1])}, {**ONE, 'bits w': torch.ones(1)}),
    'tensors without a name': sparse(['w'], {}, {'dense w': torch.ones(1), 'dense v': torch.ones(1)}),
    'a mask of another shape': sparse(['w'], {}, {'dense w': torch.ones(99), 'mask w': packed(9)}),
    'all zeros, as much as a bit can be': sparse(
        ['w'],
        {'w': told([8, 10**6], dtype='float64', mask=True)},
        {'values w': torch.zeros(0), 'bits w': packed(8 * 10**6)},
    ),
    'all ones': sparse(
        ['w'],
        {'w': told([1] * 60 + [2 * 10**6], mask=True)},
        {'values w': torch.ones(2 * 10**6).half(), 'bits w': ~packed(2 * 10**6)},
    ),
    'nested names': edited(names=NESTED),
    'a nested story': edited(tensors='{"w":' + NESTED + '}'),
    'no names': edited(names=None),
    'empty lists': edited(names='[' + '[],' * 300_000 + '[]]'),
    'lists in lists': edited(names='[' + ('[' * 50 + ']' * 50 + ',') * 5000 + '0]'),
}


def one_tensor(names, t):
    "A file in which one tensor has many names"
    return sparse(['w', *names], {n: {'as': 'w'} for n in names}, {'dense w': t})


EIGHT = torch.ones(400, 400).to(torch.float8_e4m3fn)
SHOWN = {
    'one tensor of float8': sparse(['w'], {}, {'dense w': EIGHT}),
    '4,000 names of a tensor of float8': one_tensor([f'{i}' for i in range(4000)], EIGHT),
    '4,000 names of a small tensor': one_tensor([f'{i}' for i in range(4000)], torch.eye(140)),
    '19,000 names of a tensor of float8': one_tensor([f'{i}' for i in range(19_000)], EIGHT),
    'a name of 300,000 letters': one_tensor(['x' * 300_000, *(f'{i}' for i in range(500))], torch.eye(9)),
}

MASKS = {
    **{
        f'the shape {s[:9]!r}': edited(**{'shape w': s})
        for s in (
            '',
            '-40,30',
            '1200,',
            '1' * 5000,
            '٤٠,٣٠',
            '40,30,0',
            '2,' * 100 + '1',
            'x',
            '99999999999,99999999999',
            '1e3',
            ' 40,30',
        )
    },
    'no shape': edited(**{'shape w': None}),
    'a shape of what is not there': edited(**{'shape x': '3'}),
    'another format': edited(format='fastprune ticket'),
    'no format': edited(format=None),
    'floats': retensored(w=torch.ones(150)),
    'a matrix of bits': retensored(w=torch.ones(1, 150, dtype=torch.uint8)),
    'no checksum, and something else': lambda kind, path, data: save(
        *(lambda t, m: (t, {**{k: v for k, v in m.items() if k != 'checksum'}, 'chdcksum': '1'}))(*fuzz.split(data))
    ),
}

TICKET = {
    **{
        f'{k} {v[:20]}': edited(**{k: v})
        for k in ('story', 'metrics', 'initial')
        for v in ('[]', '3', 'null', '{"w":3}', NESTED, '{"w":[NaN,1,"normal"]}', '{"round":[1]}')
    },
    **{
        f'initial {v}': edited(initial=json.dumps({'w': v}))
        for v in (
            [0.0, -1.0, 'normal'],
            [0.0, math.inf, 'normal'],
            [0.0, 1.0, 'x'],
            [0.0, 1.0, ['normal']],
            [1e300, 0.0, 'constant'],
            [0.0, 1.0],
            'abc',
        )
    },
    'initial of a name that is not there': edited(initial='{"v":[0,1,"normal"]}'),
    'initial of half precision': retensored(state_w=torch.ones(40, 30).half()),
    'a story that is the state': edited(story='{"state":1}'),
    'a story that is self': edited(story='{"self":1,"metrics":2}'),
    'a mask of nothing': retensored(mask_x=packed(8)),
    'a mask of another size': retensored(mask_w=packed(80)),
    'a state without its mask': retensored(state_w=None),
    'another tensor': retensored(other=torch.ones(1)),
    'initial that is too large': lambda kind, path, data: edited(initial='{"w":[1e6,0,"constant"]}')(
        kind, path, retensored(state_w=torch.ones(40, 30).half())(kind, path, data)
    ),
}


def table(edit):
    "A table with other contents; other files are left as they are"

    def make(kind, path, data):
        return edit if isinstance(edit, bytes) else json.dumps(edit(json.loads(data))).encode()

    return make


def row(**new):
    return table(lambda t: {**t, 'rows': [{**r, **new} for r in t['rows']]})


ODD = (None, [], {}, 'x', '1', True, [1], {'a': 'x'}, 10**25)
TABLES = {
    **{
        f'it is {b[:20]!r}': table(b)
        for b in (
            b'',
            b'[]',
            b'{}',
            b'null',
            b'3',
            b'"x"',
            b'\xff\xfe',
            NESTED.encode(),
            b'{"config":{},"rows":[],"notes":{},"rows":[]}',
            b'9' * 5000,
        )
    },
    **{f'{k} is {v!r}': table(lambda t, k=k, v=v: {**t, k: v}) for k in ('rows', 'config', 'notes') for v in ODD},
    **{f'rows of {v!r}': table(lambda t, v=v: {**t, 'rows': [v, v]}) for v in ODD},
    **{f'{k} {v!r} in rows': row(**{k: v}) for k in ('sparsity', 'metrics', 'rates', 'weights') for v in ODD},
}
ROUNDS = {
    **TABLES,
    **{
        f'kept {v!r}': table(lambda t, v=v: {**t, 'notes': {'kept': v}})
        for v in (*ODD, {'0.weight': -1, '2.weight': 1}, {'0.weight': 1.5, '2.weight': 1})
    },
}
SWEEP = {
    **{k: v for k, v in TABLES.items() if k.startswith('it is')},
    **{f'{k} is {v!r}': table(lambda t, k=k, v=v: {**t, k: v}) for k in ('run', 'row') for v in ODD},
    **{
        f'{k} {v!r} in the row': table(lambda t, k=k, v=v: {**t, 'row': {**t['row'], k: v}})
        for k in ('method', 'sparsity', 'seed', 'reached', 'seconds', 'valid_loss', 'accuracy')
        for v in (*ODD, math.nan)
    },
}


def program(*ops):
    return b'\x80\x02' + b''.join(ops) + b'.'


def text(s):
    return b'X' + struct.pack('<I', len(s)) + s.encode()


def zipped(pkl, method=zipfile.ZIP_STORED, **entries):
    "A zip file like torch's, with any pickle program in it"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as z:
        for name, data in {
            'data.pkl': pkl,
            'version': b'3\n',
            'byteorder': b'little',
            **{f'data/{k}': v for k, v in entries.items()},
        }.items():
            z.writestr(zipfile.ZipInfo(f'archive/{name}'), data, method)
    return lambda *_: out.getvalue()


def torched(obj, **kwargs):
    out = io.BytesIO()
    torch.save(obj, out, **kwargs)
    return lambda *_: out.getvalue()


def ints(*xs):
    return b''.join(b'J' + struct.pack('<i', x) for x in xs)


def tensor(numel=4, offset=0, size=(4,), stride=(1,), key='0'):
    "The pickle program of a dict with one tensor"
    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text('cpu') + ints(numel) + b'tQ'
    return (
        b'ctorch._utils\n_rebuild_tensor_v2\n('
        + storage
        + ints(offset)
        + b'('
        + ints(*size)
        + b't('
        + ints(*stride)
        + b't\x89}tR'
    )


def one(**kwargs):
    return zipped(program(b'}', text('w'), tensor(**kwargs), b's'), **{'0': bytes(16)})


def call(f, *args):
    return lambda *_: zipped(pickle.dumps({'w': Call(f, *args)}, 2))()


def marked(path):
    return call(eval, f'open({path!r}, "w").write("x")')


def named(ops):
    "A dict of what a program of `ops` makes, by one name"
    return zipped(b'\x80\x04}' + text('w') + ops + b's.')


def get(i):
    return b'h' + bytes([i])


def kept(ops, i):
    "Make something, and keep it as number `i` of the memo, not on the stack"
    return ops + b'q' + bytes([i]) + b'0'


def filled(**items):
    return b'}(' + b''.join(text(k) + v for k, v in items.items()) + b'u'


def described(**state):
    "An object of a class that is not imported, with its attributes"
    return b'cx\nY\n)R' + filled(**state) + b'b'


def layer(params=b'}', modules=b'}'):
    return described(_parameters=params, _buffers=b'}', _modules=modules)


def doubled(levels, params):
    "The program of a Learner whose model has two equal modules, each of which has two equal modules, ..."
    ops = kept(layer(params), 10)
    for i in range(10, 10 + levels):
        ops += kept(layer(params, filled(a=get(i), b=get(i))), i + 1)
    return ops + described(model=get(10 + levels))


LONG = kept(text('a' * 300_000), 0)
COUNTER, ORDERED = (kept(b'ccollections\n' + o + b'\n', 1) for o in (b'Counter', b'OrderedDict'))
PAIRS = b'(' + b''.join(ints(i) + b'N\x86' for i in range(40_000)) + b't'
MANY = b'}(' + b''.join(text(f'{i:x}') + get(2) for i in range(20_000)) + b'u'
NO_BYTES = 'bits8', 'qint8', 'quint4x2', 'uint3', 'int4', 'float4_e2m1fn_x2'  # types that hardly work


def typed(dtype):
    "A tensor of one number"
    storage = b'(' + text('storage') + b'ctorch\nUntypedStorage\n' + text('0') + text('cpu') + ints(16) + b'tQ'
    made = b'ctorch._utils\n_rebuild_tensor_v3\n(' + storage + ints(0) + 2 * (b'(' + ints(1, 1) + b't')
    return zipped(program(b'}', text('w'), made, b'\x89}ctorch\n' + dtype.encode() + b'\ntRs'), **{'0': bytes(16)})


BASE = torch.randn(1000)
PTH = {
    'a class of 600,000 letters, 50,000 times': named(LONG + (get(0) * 2 + b'\x930') * 50_000 + b'N'),
    '50,000 classes of 600,000 letters': named(LONG + get(0) * 2 + b'\x93' + (get(0) * 2 + b'\x93\x86') * 50_000),
    '300,000 arguments, 50,000 times': named(LONG + COUNTER + (get(1) + get(0) + b'R0') * 50_000 + b'N'),
    'a dict of 40,000 items, 50,000 times': named(
        ORDERED + kept(PAIRS + b'\x85', 0) + b'](' + (get(1) + get(0) + b'R') * 50_000 + b'e'
    ),
    'a tensor of 300,000 arguments, 50,000 times': named(
        LONG
        + kept(b'ctorch._tensor\n_rebuild_from_type_v2\n', 1)
        + kept(b'(ctorch._utils\n_rebuild_tensor_v2\nN' + get(0) + b'Nt', 2)
        + (get(1) + get(2) + b'R0') * 50_000
        + b'N'
    ),
    'a module in itself, of 300,000 letters': zipped(
        b'\x80\x04'
        + LONG
        + kept(b'cx\nY\n)R', 1)
        + get(1)
        + filled(_parameters=b'}', _buffers=b'}', _modules=b'}(' + get(0) + get(1) + text('b') + get(1) + b'u')
        + b'b'
        + described(model=get(1))
        + b'.'
    ),
    '20,000 parameters, 16,000 times': zipped(
        b'\x80\x04' + kept(tensor(), 2) + kept(MANY, 3) + doubled(13, get(3)) + b'.', **{'0': bytes(16)}
    ),
    'no parameters, 20,000 names, 16,000 times': zipped(
        b'\x80\x04N' + kept(b'', 2) + kept(MANY, 3) + doubled(13, get(3)) + b'.'
    ),
    'objects in objects': zipped(b'\x80\x04cx\nY\n' + b')R' * 100_000 + b'.'),
    **{f'a tensor of {o}': typed(o) for o in NO_BYTES},
    'an operation that is not known': zipped(program(b'\xff')),
    'a number, 10^9 times': torched({'w': torch.ones(1).expand(10**9)}),
    'code': marked('/tmp/fastprune-was-here'),
    'a call of print': call(print, 'x'),
    '10^9 bytes': call(bytearray, 10**9),
    'a string, 10^9 times': call(str.__mul__, 'x', 10**9),
    'a tensor of 10^9': call(torch.Tensor, 10**9),
    'an array of 10^9': call(np.zeros, 10**9),
    'a number of 10^9 bytes': call(np._core.multiarray.scalar, np.dtype('V1000000000')),
    'compressed zeros': zipped(
        program(b'}', text('w'), tensor(25 * 10**6, size=(25 * 10**6,)), b's'),
        zipfile.ZIP_DEFLATED,
        **{'0': bytes(10**8)},
    ),
    'a compressed program': zipped(program(b']' * 10**7), zipfile.ZIP_DEFLATED),
    'a storage that is not there': one(key='1'),
    'a storage that is too short': one(size=(5,)),
    'a negative place': one(offset=-1),
    'a negative shape': one(size=(-4,)),
    'a negative stride': one(stride=(-1,)),
    'strides that do not fit': one(size=(2, 2)),
    'strides that are too long': one(stride=(2**30,)),
    'a place behind the end': one(offset=2**31 - 1),
    '1,000 dimensions': one(size=(1,) * 1000, stride=(1,) * 1000),
    'a negative number of numbers': one(numel=-4),
    '600 views': torched({f'{i}': BASE[i : i + 400] for i in range(600)}),
    '20,000 names': torched({f'{i}': BASE for i in range(20_000)}),
    'an empty program': zipped(b''),
    'no program': zipped(b'.'),
    'no zip file': lambda *_: b'PK\x03\x04' + bytes(100),
    'empty dicts': zipped(b'\x80\x02' + b'}' * 10**6 + b'.'),
    'empty lists': zipped(b'\x80\x02' + b']' * 10**6 + b'.'),
    'marks': zipped(b'\x80\x02' + b'(' * 10**6 + b'.'),
    'a memo': zipped(b'\x80\x04}' + b'\x94' * 10**6 + b'.'),
    'a memo at 2^31': zipped(b'\x80\x02}r\xff\xff\xff\x7f.'),
    'a string of 2^32': zipped(b'\x80\x02X\xff\xff\xff\xffx.'),
    'bytes of 2^60': zipped(b'\x80\x04\x8e' + struct.pack('<Q', 2**60) + b'.'),
    'a frame of 2^60': zipped(b'\x80\x04\x95' + struct.pack('<Q', 2**60) + b'.'),
    'tuples of tuples as a key': zipped(program(b'})q\x00', b'h\x00h\x00\x86q\x00' * 60, b'K\x01s')),
    'keys that collide': zipped(
        program(
            b'}(',
            b''.join(b'\x8a\x10' + (i * (2**61 - 1)).to_bytes(16, 'little') + b'N' for i in range(1, 50_000)),
            b'u',
        )
    ),
    'lists in lists': zipped(program(b']' * 50_000, b'a' * 49_999)),
    'a list in itself': zipped(program(b']q\x00h\x00a')),
    'a dict in itself': zipped(program(b'}q\x00', text('model'), b'h\x00s')),
    'a call of a string': zipped(program(b'}', text('w'), text('x'), b')Rs')),
    'a state of a type': zipped(program(b'ctorch\nFloatStorage\n}b')),
    'another order of bytes': lambda *_: zipped(program(b'}', text('w'), tensor(), b's'), **{'0': bytes(16)})().replace(
        b'little', b'bigger'
    ),
    'a module': torched(torch.nn.Linear(2, 2)),
    'a list': torched([BASE]),
    'a number': torched(3),
    'a sparse tensor': torched({'w': torch.eye(9).to_sparse()}),
    'a program of TorchScript': zipped(program(b'c__torch__\nModel\n)\x81')),
}
LEGACY = {
    'a number, 10^9 times': torched({'w': torch.ones(1).expand(10**9)}, _use_new_zipfile_serialization=False),
    'a storage of 2^40': lambda kind, path, data: data.replace(struct.pack('<Q', 1200), struct.pack('<Q', 2**40)),
    'no storages': lambda kind, path, data: data[:-5000],
    'a program behind nothing': lambda *_: program(b'}'),
    'code': lambda *_: pickle.dumps(Call(eval, '1+1'), 2),
    'a string of 2^32': lambda *_: b'\x80\x02X\xff\xff\xff\xffx.',
    '600 views': torched({f'{i}': BASE[i : i + 400] for i in range(600)}, _use_new_zipfile_serialization=False),
}

headers = {k: (lambda *_, v=v: v) for k, v in HEADERS.items()}
HOSTILE = dict(
    masks={**headers, **MASKS},
    state=headers,
    sparse={**headers, **SPARSE},
    ticket={**headers, **TICKET},
    foreign=headers,
    shown=SHOWN,
    pth=PTH,
    legacy=LEGACY,
    learner={k: SPARSE[k] for k in ('a name 200,000 times', 'all zeros, as much as a bit can be')},
    rounds=ROUNDS,
    tickets=TABLES,
    sweep=SWEEP,
)
