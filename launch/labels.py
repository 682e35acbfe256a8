"""Runs a config's teacher once over augmented views of its training data and stores what it says.

    python -m launch.labels --config configs/distill/reinforced.py --output labels --views 50 --top 10 \\
      --config.data.path=imagenet --config.teacher.weights=teacher.safetensors
    python -m launch.train --config configs/distill/reinforced.py --config.teacher.labels=labels \\
      --config.data.path=imagenet

Views are drawn from the config's `augment` and `mix` sections; training on the labels makes them again, pixel for
pixel, and never builds the teacher. `--form maps` stores ReLabel's maps of whole images instead, from which training
pools the labels of new crops. Interrupted, the same command goes on where it stopped: finished shards are kept. Several
processes share the work by --part 0/4, 1/4, ...; the last to end writes labels.json.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from launch import train
from launch.shards import Progress
from research.backbones import classify, teachers
from research.core import config as configs
from research.core import sharding, storage
from research.core.errors import UserError, cli
from research.data import augment, convert, label_files, labelled_views, pipeline, transforms, views
from research.data.base import BadExample, Source
from research.data.store import Store
from research.distill import stored

Label = Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 images (B, H, W, 3) -> arrays (B, ...)
Item = tuple[int, bytes, np.ndarray | None]  # index of an example, description of a view, its image (None: unreadable)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is labelled, and how: everything but the teacher.

    Attributes:
      source: the examples.
      views: draws the views; its transform alone is used for maps.
      made: what `labels.json` will say.
      batch: views the teacher sees at a time.
      on_corrupt: `raise`, or `skip` images that cannot be read.
    """

    source: Source
    views: views.Views
    made: dict
    batch: int
    on_corrupt: str

    def items(self, index: int) -> list[Item]:
        """The views of an example, to be labelled; one without image where it cannot be read."""
        try:
            example = self.source[index]
            if self.made["form"] == label_files.MAPS:
                return [(index, b"", whole(example["image"], self.made["size"]))]
            example["image"] = transforms.decode(example["image"])
            found = []
            for number in range(self.made["views"]):
                rng = np.random.default_rng((self.made["seed"], index, number))
                view, result = self.views.draw(example, rng)
                found.append((index, views.pack(view), result["image"]))
            return found
        except BadExample as error:
            name = f"{self.source.where(index)}: {error}"
            if self.on_corrupt == "raise":
                raise UserError(f"{name}; replace it, or set data.on_corrupt=skip to leave it out") from None
            logging.getLogger(__name__).warning("%s; it gets no labels", name)
            return [(index, b"", None)]


def whole(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """The whole image, not keeping its aspect, as uint8 (size, size, 3), bicubic."""
    return np.asarray(Image.fromarray(transforms.decode(image)).resize((size, size), augment.BICUBIC))


def records(job: Job, label: Label, pool: concurrent.futures.Executor, first: int, last: int) -> Iterator[bytes]:
    """The records of examples first to last (excluded); images are made ahead while the teacher runs."""
    kind, blank = label_files.layout(job.made), []
    for index, group in itertools.groupby(_labelled(job, label, pool, range(first, last)), key=lambda found: found[0]):
        kept = [(view, arrays) for _, view, arrays in group if arrays is not None]
        rows = np.zeros(len(kept), kind)
        for row, (_, arrays) in zip(rows, kept, strict=True):
            for name in kind.names:
                row[name] = arrays[name]
        yield label_files.pack(index, rows, [view for view, _ in kept] or blank)


def _labelled(job: Job, label: Label, pool, indices: Iterable[int]) -> Iterator[tuple[int, bytes, dict | None]]:
    """(index, description, arrays) of every view in order, in batches of equal size."""
    ahead = _ahead(pool, job.items, indices, max(1, 2 * job.batch // job.made["views"]))
    for batch in _batched(itertools.chain.from_iterable(ahead), job.batch):
        images = [image for _, _, image in batch if image is not None]
        if images:
            padded = np.stack(images + images[-1:] * (job.batch - len(images)))
            arrays = label(padded)
        row = itertools.count()
        for index, view, image in batch:
            number = None if image is None else next(row)
            yield index, view, None if number is None else {name: array[number] for name, array in arrays.items()}


def _ahead(pool, function: Callable, values: Iterable, count: int) -> Iterator:
    """`map(function, values)` in the pool, at most `count` ahead of what was taken."""
    values, waiting = iter(values), []
    for value in itertools.islice(values, count):
        waiting.append(pool.submit(function, value))
    try:
        while waiting:
            found = waiting.pop(0).result()
            waiting += [pool.submit(function, value) for value in itertools.islice(values, 1)]
            yield found
    finally:
        for future in waiting:
            future.cancel()


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def labeller(networks: teachers.Networks, variables: dict, made: dict, batch: int) -> Label:
    """The teachers as a function of host images, on all devices of this process where the batch divides."""
    if made["form"] == label_files.MAPS:
        [(name, network)] = networks.items()
        head = stored.find_head(network, variables[name]["params"], variables[name]["model_state"])
        scores = stored.label_map(network, head, made["top"])
        apply = lambda found, images: scores(found[name]["params"], found[name]["model_state"], images)
    else:
        apply = lambda *arguments: stored.label(teachers.apply(networks, *arguments)[0], made["top"])
    devices = jax.local_devices()
    mesh = sharding.mesh({"data": -1}, devices if batch % len(devices) == 0 else devices[:1])
    placed = jax.device_put(variables, sharding.replicated(mesh))
    run = jax.jit(lambda variables, images: apply(variables, classify.unit(images)))

    def label(images):
        return jax.device_get(run(placed, jax.device_put(images, sharding.batch_sharding(mesh))))

    return label


def digest(*trees) -> str:
    """A short name of weights: equal weights, equal names."""
    found = hashlib.sha256()
    for path, leaf in sharding.paths(trees):
        found.update(path.encode())
        found.update(np.asarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()[:16]


def write(job: Job, label: Label, store: Store, part: tuple[int, int]) -> int:
    """Makes this part's shards, and `labels.json` after the last of all; returns how many shards others still make."""
    made = job.made
    done = label_files.begin(store, made)
    if done is None:
        return 0
    mine = [number for number in range(made["shards"]) if number % part[1] == part[0]]
    left = [number for number in mine if number not in {shard.number for shard in done}]
    if len(left) < len(mine):
        print(f"{len(mine) - len(left)} shards were finished before, {len(left)} are left", file=sys.stderr)
    sizes = [convert.bounds(made["data"]["examples"], made["shards"], number) for number in left]
    progress, seen = Progress(sum(last - first for first, last in sizes)), itertools.count(1)

    def found(first, last):
        for record in records(job, label, pool, first, last):
            yield record
            progress.show(next(seen))

    with concurrent.futures.ThreadPoolExecutor(pipeline.cores() * job.source.concurrency) as pool:
        try:
            for number in left:
                label_files.write_shard(store, made, number, found)
        finally:
            progress.close()
            pool.shutdown(cancel_futures=True)
    try:
        done = label_files.finished(store, made)
    except FileNotFoundError:  # another part has just ended it all
        done = []
    if len(done) == made["shards"]:
        label_files.finish(store, made, done)
    return 0 if label_files.METADATA in store.sizes() else made["shards"] - len(done)


def teachers_of(config: ConfigDict) -> tuple[teachers.Networks, dict]:
    """(networks, {name: {"params", "model_state"}}) of a config's teachers; random ones are of the config's seed."""
    networks = teachers.networks(config)
    variables = teachers.frozen(networks, jax.random.PRNGKey(config.seed))
    for name, found in teachers.weights(config, networks).items():
        dtype = networks[name].module.dtype
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), found["params"])
        variables[name] = {"params": params, "model_state": found["model_state"]}
    return networks, variables


def prepare(config: ConfigDict, options: argparse.Namespace) -> tuple[Job, Label]:
    """The job and its teachers, which are trained by their recipes first where they have those and no weights."""
    config = config.copy_and_resolve_references().unlock()
    if not config.get("teacher") or not config.teacher.model:
        raise UserError("teacher.model: not set; labels need a teacher")
    config.teacher.labels = ""
    data = train.open_data(config.lock())
    config = train.with_teacher(train.resolve(config, data), storage.folder(options.output))
    identity, maps = labelled_views.identity(data.train), options.form == label_files.MAPS
    classes = identity["num_classes"]
    top = options.top or (min(5, classes) if maps else classes)
    if top > classes:
        raise UserError(f"--top {options.top}: the data has {classes} classes; 0 keeps all")
    if maps and len(teachers.sections(config)) > 1:
        raise UserError("--form maps: maps are of one teacher; leave teacher.ensemble out")
    train.train_teachers(config)
    mixing = views.Mixing(**{key: config.mix[key] for key in views.MIX})
    size = options.size if maps else config.augment.size
    sized = config.copy_and_resolve_references().unlock()
    sized.augment.size = size
    networks, variables = teachers_of(sized.lock())
    made = {
        "form": options.form,
        "data": identity,
        "teacher": {"model": "+".join(network.name for network in networks.values()), "digest": digest(variables)},
        "top": top,
        "dtype": options.dtype,
        "shards": min(options.shards, identity["examples"]),
    }
    if maps:
        made |= {"views": 1, "size": size, "map": _map_shape(networks, variables, size)}
    else:
        augments, mixes = labelled_views.options(data.train_transform), labelled_views.options(mixing)
        made |= {"views": options.views, "seed": config.seed, "augment": augments, "mix": mixes}
    batch = options.batch or config.batch_size
    job = Job(data.train, views.Views(data.train, data.train_transform, mixing), made, batch, config.data.on_corrupt)
    return job, labeller(networks, variables, made, batch)


def _map_shape(networks: teachers.Networks, variables: dict, size: int) -> list[int]:
    [(name, network)] = networks.items()
    found = variables[name]["params"], variables[name]["model_state"]
    scores = stored.label_map(network, stored.find_head(network, *found), 1)
    return list(jax.eval_shape(scores, *found, jnp.zeros((1, size, size, 3)))["scores"].shape[1:3])


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--config", required=True, help="config file, with its argument after a colon")
    found.add_argument("--output", required=True, metavar="DIR", help="folder to write, local or gs://")
    found.add_argument("--form", default="crops", choices=label_files.FORMS, help="labels of views, or maps (crops)")
    found.add_argument("--views", type=int, default=1, help="views of each example (1); maps have one")
    found.add_argument("--top", type=int, default=0, help="classes kept, 0: all; maps: 5 at each position (0)")
    found.add_argument("--dtype", default="float32", choices=label_files.DTYPES, help="of the stored values (float32)")
    found.add_argument("--size", type=int, default=475, help="side of the whole image under --form maps (475)")
    found.add_argument("--shards", type=int, default=16, help="files (16); 100 MB to 1 GB each is good")
    found.add_argument("--part", default="0/1", metavar="I/N", help="this process makes shards I, I + N, ... (0/1)")
    found.add_argument("--batch", type=int, default=0, help="views the teacher sees at a time (0: the batch_size)")
    return found


@cli
def main(argv: list[str] | None = None) -> int:
    options, overrides = configs.parse_args(parser(), argv)
    for name, low, high in (("views", 1, 65535), ("shards", 1, 99999), ("top", 0, 1 << 20), ("size", 1, 1 << 14)):
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name} {getattr(options, name)}: must be {low} to {high}")
    number, _, count = options.part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--part {options.part}: write it as 0/4, 1/4, ... 3/4")
    store = Store(options.output, key="--output")
    job, label = prepare(configs.load(options.config, overrides), options)
    missing = write(job, label, store, (int(number), int(count)))
    if missing:
        print(f"{options.output}: this part is done, {missing} shards are other parts'")
        return 0
    made, shards = label_files.read_metadata(store, "--output")
    count, size = sum(shard.examples for shard in shards), sum(shard.bytes for shard in shards)
    print(f"{options.output}: {made['views']} views of {count:,} examples, {size / 1e6:,.1f} MB: teacher.labels")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
