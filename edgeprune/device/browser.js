// Runs IN the browser, in a dedicated worker: the jobs of agent.py for onnxruntime-web, in the same format.
//
// The page posts {kind: "start", provider, threads, base} once and {kind: "job", job, blobs} for each job. Answers are
// {kind: "ready", hello} and {kind: "answer", answer, blobs}. A job that fails is an answer with ok false.
//
// Single kernels are told by the runtime's own profiler, as on other devices: the WebAssembly build prints the same
// trace to standard output, which Emscripten gives to console.log as it found it when it was loaded.

let ort = null;
let provider = "wasm";
const trace = [];
let tracing = false;
const log = console.log.bind(console);
console.log = (...parts) => (tracing ? trace.push(String(parts[0])) : log(...parts));

// measurement protocol: a change between these two lines changes the fingerprint of every table

const SAMPLE_TICKS = 200; // a sample of a network lasts so many ticks of the clock, and at least a millisecond
const SETTLED = 0.97; // a second half faster than this share of the first: code was still being compiled
const EXTENSIONS = 4;
const DISTURBED = 1.2; // a run that takes so many times the fastest was disturbed

// Smallest step of the clock in milliseconds: 5 us where the page is isolated, else 100 us or worse.
function clockStep() {
  let step = Infinity;
  for (let i = 0, last = performance.now(); i < 50; ) {
    const now = performance.now();
    if (now > last) {
      step = Math.min(step, now - last);
      last = now;
      i += 1;
    }
  }
  return step;
}

// Float32 values of about unit size, no denormals; one block, repeated: the values do not decide the time.
function randomValues(count, scale = 1) {
  const values = new Float32Array(count);
  let state = 1;
  const block = Math.min(count, 1 << 16);
  for (let i = 0; i < block; i += 1) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = ((state / 4294967296) * 3.4 - 1.7 || 0.5) * scale;
  }
  for (let done = block; done < count; done += block) {
    values.copyWithin(done, 0, Math.min(block, count - done));
  }
  return values;
}

const product = (dims) => dims.reduce((a, b) => a * b, 1);

// A session; constants that the model leaves open are made here, one block of values for all of equal scale.
async function open(model, weights = [], profiled = false) {
  const largest = new Map();
  for (const [, dims, scale] of weights) {
    largest.set(scale, Math.max(largest.get(scale) ?? 0, product(dims)));
  }
  const blocks = new Map([...largest].map(([scale, count]) => [scale, randomValues(count, scale)]));
  return ort.InferenceSession.create(model, {
    executionProviders: [provider],
    graphOptimizationLevel: "all",
    executionMode: "sequential",
    enableProfiling: profiled,
    logSeverityLevel: 4,
    extra: { session: { set_denormal_as_zero: "1" } },
    externalData: weights.map(([name, dims, scale]) => ({
      path: name,
      data: new Uint8Array(blocks.get(scale).buffer, 0, 4 * product(dims)),
    })),
  });
}

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array };

function randomFeeds(session) {
  const feeds = {};
  for (const input of session.inputMetadata) {
    const shape = input.shape.map((size) => (typeof size === "number" && size > 0 ? size : 1));
    const values = randomValues(product(shape));
    const array = input.type === "float32" ? values : new ARRAYS[input.type](values.length);
    feeds[input.name] = new ort.Tensor(input.type, array, shape);
  }
  return feeds;
}

// Milliseconds per run of `inner` back-to-back runs.
async function sample(session, feeds, inner = 1) {
  const begin = performance.now();
  for (let i = 0; i < inner; i += 1) {
    const outputs = await session.run(feeds);
    for (const name in outputs) outputs[name].dispose();
  }
  return (performance.now() - begin) / inner;
}

async function spend(session, feeds, milliseconds, least, inner = 1) {
  const taken = [];
  const end = performance.now() + milliseconds;
  while (performance.now() < end || taken.length < least) taken.push(await sample(session, feeds, inner));
  return taken;
}

// The lower quartile.
function low(values) {
  return [...values].sort((a, b) => a - b)[values.length >> 2];
}

// Read so many megabytes, a cache line at a time, to empty the caches.
function evict(block) {
  let sum = 0;
  for (let i = 0; i < block.length; i += 16) sum += block[i];
  return sum;
}

// Whether each run took longer than its fastest neighbours by more than they differ by themselves: another process, the
// browser itself. No page is told, so it is read from the times.
function disturbed(times) {
  const limit = DISTURBED * Math.min(...times);
  return times.map((taken) => taken > limit);
}

// The same for runs of several nodes, against the fastest of each node: on a busy device no run may be quiet as a whole.
function disturbedRuns(micros, nodes, step) {
  const best = micros.slice(0, nodes);
  for (let i = 0; i < micros.length; i += 1) best[i % nodes] = Math.min(best[i % nodes], micros[i]);
  const limit = best.reduce((sum, each) => sum + DISTURBED * each + step, 0);
  const flags = [];
  for (let i = 0; i < micros.length; i += nodes) {
    flags.push(micros.subarray(i, i + nodes).reduce((a, b) => a + b, 0) > limit);
  }
  return flags;
}

const quiet = (times) => times.length - disturbed(times).filter(Boolean).length;

// Runs until the time is over, half of `least` were quiet (on a busy device three times as long is waited for those),
// and no run is faster for having been compiled meanwhile; which run counts first.
async function settle(take, job) {
  const times = [];
  let first = 0;
  for (let extension = 0; ; extension += 1) {
    const begin = performance.now();
    for (let n = 0; ; n += 1) {
      const spent = performance.now() - begin;
      const enough = 2 * quiet(times.slice(first)) >= job.least || spent > 3 * job.time_ms + 100;
      if (n >= job.least && spent >= job.time_ms && enough) break;
      times.push(await take());
    }
    const counted = times.slice(first);
    const half = counted.length >> 1;
    if (extension >= EXTENSIONS || low(counted.slice(half)) >= SETTLED * low(counted.slice(0, half))) break;
    first += half;
  }
  return { times, first };
}

// Per-node microseconds of one model, once for each entry of evict_mb: so much memory is read before every run. With
// `compare` a second session without the profiler takes turns with the first, so that its own cost shows.
async function measureKernels(job, blobs) {
  const step = clockStep();
  if (step > 0.05) {
    throw new Error(
      `the clock of this page has steps of ${Math.round(1e3 * step)} us, too coarse for single kernels; open the ` +
        "page by https or as localhost",
    );
  }
  const filler = randomValues(Math.floor(Math.max(...job.evict_mb) * 250000));
  const sessions = [];
  try {
    for (const profiled of job.compare ? [true, false] : [true]) {
      const session = await open(blobs[0], job.weights, profiled);
      sessions.push([session, randomFeeds(session)]);
    }
    const [profiled, feeds] = sessions[0];
    const warm = (await spend(profiled, feeds, job.warmup_ms, 3)).length;
    const counts = [];
    const firsts = [];
    const whole = [];
    for (const megabytes of job.evict_mb) {
      const part = filler.subarray(0, Math.floor(megabytes * 250000));
      const plain = [];
      const { times, first } = await settle(async () => {
        evict(part);
        const taken = await sample(profiled, feeds);
        if (job.compare) {
          evict(part);
          plain.push(await sample(...sessions[1]));
        }
        return taken;
      }, job);
      counts.push(times.length);
      firsts.push(first);
      const alone = plain.slice(first);
      const odd = disturbed(alone);
      whole.push(alone.map((taken, i) => [taken / 1e3, Number(odd[i])]));
    }
    const events = readTrace(profiled);
    const nodes = [];
    for (const event of events) {
      if (nodes.length && event.args.node_index === nodes[0][2]) break;
      nodes.push([event.name.slice(0, -"_kernel_time".length), event.args.op_name, event.args.node_index]);
    }
    const runs = warm + counts.reduce((a, b) => a + b, 0);
    if (!nodes.length || events.length !== runs * nodes.length) {
      throw new Error(`${events.length} profile events are not ${runs} runs of ${nodes.length} nodes`);
    }
    const results = [];
    const flags = [];
    let start = warm;
    counts.forEach((count, at) => {
      const kept = events.slice((start + firsts[at]) * nodes.length, (start + count) * nodes.length);
      const micros = Int32Array.from(kept, (event) => event.dur);
      flags.push(disturbedRuns(micros, nodes.length, 1e3 * step));
      results.push(micros.buffer);
      start += count;
    });
    const fields = {
      nodes: nodes.map(([name, op]) => [name, op]),
      interrupted: flags.map((kind) => kind.map(Number)),
      whole,
      clock_us: 1e3 * step,
    };
    return [fields, results];
  } finally {
    for (const [session] of sessions) await session.release();
  }
}

function readTrace(session) {
  trace.length = 0;
  tracing = true;
  try {
    session.endProfiling();
  } finally {
    tracing = false;
  }
  const events = [];
  for (const line of trace) {
    if (!line.includes("_kernel_time")) continue;
    const event = JSON.parse(line.replace(/^\[|,\s*$|\]\s*$/g, ""));
    if (event.cat === "Node" && event.name.endsWith("_kernel_time")) events.push(event);
  }
  trace.length = 0;
  return events;
}

function shuffle(order, random) {
  for (let i = order.length - 1; i > 0; i -= 1) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
}

function generator(seed) {
  let state = (seed * 2654435761 + 1) >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 4294967296;
  };
}

// Interleaved rounds over whole networks, sessions side by side, order shuffled in each round; each turn of a network
// starts with one run that is not counted.
async function measureNetworks(job, blobs) {
  const shortest = Math.max(1, SAMPLE_TICKS * clockStep());
  const ready = [];
  try {
    for (let i = 0; i < blobs.length; i += 1) {
      const session = await open(blobs[i], job.weights[i]);
      ready.push([session, randomFeeds(session)]);
    }
    const inner = [];
    for (const [session, feeds] of ready) {
      const { times, first } = await settle(() => sample(session, feeds), { least: 10, time_ms: job.warmup_ms });
      inner.push(Math.max(1, Math.floor(shortest / Math.max(low(times.slice(first)), 1e-4))));
    }
    const samples = ready.map(() => []);
    const random = generator(job.seed ?? 0);
    const order = [...ready.keys()];
    const deadline = performance.now() + 1e3 * job.limit_s;
    for (let done = 0; done < job.rounds; done += 1) {
      shuffle(order, random);
      for (const index of order) {
        await sample(...ready[index]);
        samples[index].push(await spend(...ready[index], job.round_ms, 1, inner[index]));
      }
      if (performance.now() > deadline && done >= 4) break;
    }
    const flat = samples.flat().flatMap((round) => {
      const odd = disturbed(round);
      return round.flatMap((taken, i) => [taken / 1e3, Number(odd[i])]);
    });
    const fields = { samples: samples.map((rounds) => rounds.map((round) => round.length)) };
    return [fields, [Float64Array.from(flat).buffer]];
  } finally {
    for (const [session] of ready) await session.release();
  }
}

// end of the measurement protocol

// Outputs of a model for given inputs; `inputs` lists [name, dtype, shape], the blobs after the model follow.
async function run(job, blobs) {
  const session = await open(blobs[0]);
  try {
    const feeds = {};
    job.inputs.forEach(([name, dtype, shape], i) => {
      feeds[name] = new ort.Tensor(dtype, new ARRAYS[dtype](blobs[i + 1].slice().buffer), shape);
    });
    const outputs = await session.run(feeds);
    const described = session.outputNames.map((name) => [name, outputs[name].type, [...outputs[name].dims]]);
    return [{ outputs: described }, session.outputNames.map((name) => outputs[name].data.slice().buffer)];
  } finally {
    await session.release();
  }
}

const JOBS = { kernels: measureKernels, networks: measureNetworks, run };

// Who we are. Browsers tell little: no processor's name, and memory and system only in some.
async function hello(threads, gpu) {
  const wanted = ["architecture", "bitness", "model", "platform", "platformVersion", "fullVersionList"];
  const told = (await navigator.userAgentData?.getHighEntropyValues?.(wanted)) ?? {};
  const brands = (told.fullVersionList ?? []).filter((one) => !/not.?a.?brand/i.test(one.brand));
  const brand = brands.find((one) => one.brand !== "Chromium") ?? brands[0];
  return {
    agent: navigator.userAgent,
    browser: brand ? `${brand.brand} ${brand.version}` : "",
    platform: told.platform ? `${told.platform} ${told.platformVersion}`.trim() : navigator.platform ?? "",
    arch: told.architecture ? `${told.architecture} ${told.bitness}` : "",
    model: told.model ?? "",
    gpu,
    cores: navigator.hardwareConcurrency ?? 0,
    memory_gb: navigator.deviceMemory ?? 0,
    runtime_version: ort.env.versions.web,
    provider,
    threads,
    isolated: self.crossOriginIsolated,
    clock_us: Math.round(1e5 * clockStep()) / 100,
  };
}

// What WebGPU would run on, as far as it is told.
async function graphics() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) {
    throw new Error("this browser offers no WebGPU here; use --target web-wasm, or a browser that has it");
  }
  const { vendor, architecture, device, description, isFallbackAdapter } = adapter.info;
  const names = [vendor, architecture, device, description, isFallbackAdapter ? "(software)" : ""];
  return names.filter(Boolean).join(" ") || "an unnamed GPU";
}

async function start(message) {
  provider = message.provider;
  if (message.threads > 1 && !self.crossOriginIsolated) {
    throw new Error(`${message.threads} threads need a page opened by https or as localhost; ask for one thread`);
  }
  const gpu = provider === "webgpu" ? await graphics() : "";
  ort = await import(`${message.base}ort/${provider === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
  ort.env.wasm.wasmPaths = `${message.base}ort/`;
  ort.env.wasm.numThreads = message.threads;
  ort.env.logLevel = "error";
  return hello(message.threads, gpu);
}

const words = (error) => `${error?.name ?? "Error"}: ${String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 500)}`;

self.onmessage = async ({ data }) => {
  if (data.kind === "start") {
    try {
      self.postMessage({ kind: "ready", hello: { ok: true, ...(await start(data)) } });
    } catch (error) {
      self.postMessage({ kind: "ready", hello: { ok: false, error: words(error) } });
    }
    return;
  }
  let answer;
  let blobs = [];
  try {
    const todo = JOBS[data.job.op];
    if (!todo) throw new Error(`a browser knows no job ${data.job.op}`);
    [answer, blobs] = await todo(data.job, data.blobs);
    answer.ok = true;
  } catch (error) {
    answer = { ok: false, error: words(error) };
  }
  self.postMessage({ kind: "answer", answer, blobs }, blobs);
};
