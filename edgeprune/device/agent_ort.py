# ruff: noqa: B905, UP031  (written for Python 3.8)
"""Runs ON the device, sent there together with agent.py: the jobs, done with onnxruntime.

Standard library only, Python 3.8 syntax; onnxruntime and numpy are imported inside functions. A job is a function of
its header and blobs that returns the answer's, or raises.
"""

import gc
import glob
import json
import os
import platform
import random
import shutil
import struct
import tempfile
import time

# measurement protocol: a change between these two lines changes the fingerprint of every table


def session_options(job):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(job.get("threads", 1))
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def random_values(count):
    """float32 values of about unit size, no denormals; one block, repeated: the values do not decide the time."""
    import numpy as np

    block = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    block[np.abs(block) < 1e-3] = 1e-3
    return np.resize(block, count)


def add_weights(options, specs):
    """Constants the model leaves open are made here, scaled to keep activations of unit size."""
    import numpy as np
    import onnxruntime as ort

    if not specs:
        return []
    total = max(int(np.prod(dims)) for _, dims, _ in specs)
    values = random_values(total)
    arrays = []
    for _, dims, scale in specs:
        size = int(np.prod(dims))
        arrays.append((values[:size] * np.float32(scale)).reshape([int(d) for d in dims]))
    held = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    options.add_external_initializers([name for name, _, _ in specs], held)
    return [arrays, held]


def bound(session):
    """The session's inputs and outputs bound to preallocated memory; returns (binding, what must stay alive)."""
    import numpy as np
    import onnxruntime as ort

    binding = session.io_binding()
    held = []
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in value.shape]
        dtype = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}.get(value.type, np.float32)
        held.append(ort.OrtValue.ortvalue_from_numpy(random_values(int(np.prod(shape))).reshape(shape).astype(dtype)))
        binding.bind_ortvalue_input(value.name, held[-1])
    for value in session.get_outputs():
        shape = list(value.shape)
        if value.type == "tensor(float)" and all(isinstance(d, int) and d > 0 for d in shape):
            held.append(ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu"))
            binding.bind_ortvalue_output(value.name, held[-1])
        else:
            binding.bind_output(value.name, "cpu")
    return binding, held


def switches():
    """How often the scheduler took the processor away from this thread so far; 0 where that is not known."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    except (ImportError, AttributeError, ValueError):
        return 0


def sample(session, binding, inner, threads):
    """(seconds per run, whether the scheduler interrupted it) of ``inner`` back-to-back runs.

    With one thread an interrupted sample is told in processor time instead: the wait for other processes is not
    latency of this network. What remains of the disturbance is an emptied cache.
    """
    run, before = session.run_with_iobinding, switches()
    cpu, wall = time.thread_time(), time.perf_counter()
    for _ in range(inner):
        run(binding)
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    interrupted = switches() != before
    return (cpu if interrupted and threads == 1 else wall) / inner, interrupted


def spend(session, binding, milliseconds, least, inner=1, threads=1):
    """Sample until the time is over, at least ``least`` times."""
    taken: list = []
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end or len(taken) < least:
        taken.append(sample(session, binding, inner, threads))
    return taken


def enough(job, seconds, samples):
    """Whether to stop: the time is over and there are runs enough, half of ``least`` uninterrupted; on a busy
    processor three times as long is waited for those."""
    if seconds * 1e3 < job["time_ms"] or len(samples) < job["least"]:
        return False
    good = sum(1 for _, interrupted in samples if not interrupted)
    return 2 * good >= job["least"] or seconds * 1e3 > 3 * job["time_ms"] + 100


def measure_kernels(job, blobs):
    """Per-node microseconds of one model from the runtime's profiler, once for each entry of ``evict_mb``: so much
    memory is read before every run, to empty the caches. With ``compare`` a second session without the profiler takes
    turns with the first, so that the profiler's own cost shows.
    """
    import numpy as np
    import onnxruntime as ort

    folder = tempfile.mkdtemp(prefix="edgeprune-")
    threads = int(job["threads"])
    filler = random_values(int(max(job["evict_mb"]) * 250000))
    try:
        ready, kept = [], []
        for profiled in (True, False) if job["compare"] else (True,):
            options = session_options(job)
            options.enable_profiling = profiled
            options.profile_file_prefix = os.path.join(folder, "p")
            kept.append(add_weights(options, job["weights"]))
            session = ort.InferenceSession(blobs[0], options, providers=[job["provider"]])
            binding, held = bound(session)
            kept.append(held)
            ready.append((session, binding))
        gc.disable()
        session, binding = ready[0]
        warm = len(spend(session, binding, job["warmup_ms"], 2))
        told: list = []
        plain: list = []
        for evict_mb in job["evict_mb"]:
            part = filler[: int(evict_mb * 250000)]
            told.append([])
            plain.append([])
            begin = time.perf_counter()
            while not enough(job, time.perf_counter() - begin, told[-1]):
                for (session, binding), samples in zip(ready, (told[-1], plain[-1])):
                    if len(part):
                        part.max()
                    samples.append(sample(session, binding, 1, threads))
        session = ready[0][0]
        with open(session.end_profiling(), "rb") as file:
            events = [e for e in json.load(file) if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        nodes: list = []
        for event in events:
            if nodes and event["args"].get("node_index") == nodes[0][2]:
                break
            nodes.append((event["name"][: -len("_kernel_time")], event["args"]["op_name"], event["args"]["node_index"]))
        counts = [len(samples) for samples in told]
        if not nodes or len(events) != (warm + sum(counts)) * len(nodes):
            raise RuntimeError("%d profile events are not %s runs of %d nodes" % (len(events), counts, len(nodes)))
        micros = np.array([e["dur"] for e in events], np.int32).reshape(-1, len(nodes))
        starts = [warm + sum(counts[:at]) for at in range(len(counts))]
        answer = {"nodes": [[name, op] for name, op, _ in nodes]}
        answer["interrupted"] = [[int(flag) for _, flag in samples] for samples in told]
        answer["whole"] = [[[seconds, int(flag)] for seconds, flag in samples] for samples in plain]
        return answer, [micros[start : start + count].tobytes() for start, count in zip(starts, counts)]
    finally:
        gc.enable()
        shutil.rmtree(folder, ignore_errors=True)


def measure_networks(job, blobs):
    """Interleaved rounds over whole networks, sessions side by side, order shuffled in each round.

    One sample is the mean of ``inner`` back-to-back runs, so that it lasts a millisecond; each turn of a network
    starts with one run that is not counted, since its neighbours have emptied the caches.
    """
    import onnxruntime as ort

    ready, kept = [], []
    for blob, weights in zip(blobs, job["weights"]):
        options = session_options(job)
        kept.append(add_weights(options, weights))
        session = ort.InferenceSession(blob, options, providers=[job["provider"]])
        binding, held = bound(session)
        kept.append(held)
        ready.append((session, binding))
    order = list(range(len(ready)))
    shuffle = random.Random(int(job.get("seed", 0))).shuffle
    inner = []
    for session, binding in ready:
        taken = sorted(seconds for seconds, _ in spend(session, binding, job["warmup_ms"], 3))
        inner.append(max(1, int(1e-3 / max(taken[len(taken) // 2], 1e-7))))
    samples: list = [[] for _ in ready]
    deadline = time.perf_counter() + job["limit_s"]
    gc.disable()
    try:
        for done in range(job["rounds"]):
            shuffle(order)
            for index in order:
                session, binding = ready[index]
                session.run_with_iobinding(binding)
                taken = spend(session, binding, job["round_ms"], 1, inner[index], int(job["threads"]))
                samples[index].append(taken)
            if time.perf_counter() > deadline and done >= 4:
                break
    finally:
        gc.enable()
    flat = [value for rounds in samples for one in rounds for pair in one for value in pair]
    return {"samples": [[len(one) for one in rounds] for rounds in samples]}, [struct.pack("<%dd" % len(flat), *flat)]


# end of the measurement protocol


def hello(job, blobs):
    """Who we are; raises when the runtime or its provider is missing."""
    import onnxruntime as ort

    providers = ort.get_available_providers()
    if job["provider"] not in providers:
        raise RuntimeError("onnxruntime %s has no %s here, only %s" % (ort.__version__, job["provider"], providers))
    return {
        "machine": machine_name(),
        "arch": platform.machine(),
        "os": "%s %s" % (platform.system(), platform.release()),
        "runtime_version": ort.__version__,
        "cores": os.cpu_count(),
    }, []


def machine_name():
    for path in ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model"):
        if os.path.exists(path):
            with open(path, "rb") as file:
                return file.read().decode("utf-8", "replace").strip("\0\n ")
    name, features = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", "rb") as file:
            for line in file.read().decode("utf-8", "replace").splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                if key.strip() in ("flags", "Features") and not features:
                    widest = [f for f in ("avx512f", "avx2", "asimd") if f in value.split()]
                    features = " " + widest[0] if widest else ""
    return name + features


def optimize(job, blobs):
    """The graph as the runtime runs it, in the runtime's own ONNX dialect."""
    import onnxruntime as ort

    folder = tempfile.mkdtemp(prefix="edgeprune-")
    try:
        options = session_options(job)
        weights = add_weights(options, job.get("weights", []))
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        ort.InferenceSession(blobs[0], options, providers=[job["provider"]])
        del weights
        with open(glob.glob(os.path.join(folder, "optimized.onnx"))[0], "rb") as file:
            return {}, [file.read()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(job, blobs):
    """Outputs of a model for given inputs; ``inputs`` lists [name, dtype, shape], the blobs after the model follow."""
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(blobs[0], session_options(job), providers=[job["provider"]])
    feeds = {}
    for (name, dtype, shape), blob in zip(job["inputs"], blobs[1:]):
        feeds[name] = np.frombuffer(blob, dtype).reshape(shape)
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(names, feeds)
    described = [[name, str(array.dtype), list(array.shape)] for name, array in zip(names, outputs)]
    return {"outputs": described}, [np.ascontiguousarray(array).tobytes() for array in outputs]


JOBS = {
    "hello": hello,
    "kernels": measure_kernels,
    "networks": measure_networks,
    "optimize": optimize,
    "run": run,
}
