"""Defaults that every config starts from: the engine's sections, each option with its unit."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """A config that trains nothing yet: fill in `experiment`, `data`, `students` (or `model`) and lengths."""
    c = ConfigDict()
    c.experiment = ""  # import path of a module with `experiment(config) -> Experiment`
    c.seed = 0
    c.batch_size = 256  # global examples a step
    c.epochs = 1.0
    c.steps = 0  # 0: from epochs
    c.steps_per_epoch = 0  # filled in from the data

    c.data = ConfigDict()
    c.data.kind = "digits"  # digits, folder, zip, arrayrecord, tfds, arrays, fractals, text
    c.data.path = ""
    c.data.split = "train"
    c.data.num_classes = 0  # 0: from the data; another number must equal it
    c.data.num_examples = 0  # of the training split, filled in from the data
    c.data.options = ConfigDict()  # of the source, such as the size of fractals
    c.data.on_corrupt = "raise"  # or skip
    c.data.workers = 0  # decoding processes; 0 uses threads
    c.data.repeats = 1  # repeated augmentation

    c.augment = ConfigDict()  # training transform, see research.data.transforms.build
    c.augment.size = 224
    c.augment.crop = "resized"  # resized (random-resized), pad (pad 4 and crop), none
    c.augment.pad = 4  # pixels a side, for crop="pad"
    c.augment.scale = (0.08, 1.0)
    c.augment.flip = 0.5  # probability
    c.augment.auto = ""  # e.g. rand-m7-mstd0.5
    c.augment.jitter = 0.0
    c.augment.erase = 0.0  # probability
    c.augment.strong = ""  # RandAugment of a second view of each image, for losses of two views

    c.eval = ConfigDict()
    c.eval.split = "test"
    c.eval.size = 224
    c.eval.crop = 0.875  # side of the centre crop over the resized image's
    c.eval.batch_size = 0  # 0: as in training
    c.eval.every = 1.0  # epochs; 0: at the end only

    c.mix = ConfigDict()  # on device, see research.data.mixup
    c.mix.mixup = 0.0
    c.mix.cutmix = 0.0
    c.mix.prob = 1.0
    c.mix.switch_prob = 0.5
    c.mix.group = 0  # examples that share one lam; 0: the global batch

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-3
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip = 0.0  # global gradient norm; 0: off
    c.optimizer.options = ConfigDict()  # of the optimiser, such as momentum
    c.schedule = ConfigDict()
    c.schedule.name = "cosine"
    c.schedule.warmup_epochs = 5.0
    c.schedule.warmup_lr = 1e-6
    c.schedule.min_lr = 1e-6
    c.schedule.per_step = False  # False: constant within an epoch, as timm
    c.ema = ()  # decays, e.g. (0.9998,)

    c.parallel = ConfigDict()
    c.parallel.mode = "jit"  # or pmap
    c.parallel.axes = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    c.parallel.rules = ((".*", "replicate"),)
    c.parallel.accumulate = 1
    c.parallel.patience = 600.0  # seconds without a finished step that end the run with status 42; 0: never

    c.log = ConfigDict()
    c.log.every = 50  # steps
    c.log.tensorboard = True
    c.save = ConfigDict()
    c.save.every = 1.0  # epochs; 0: at the end only
    c.save.keep = 2
    c.save.best = ""  # metric that ranks checkpoints, higher is better
    return c


def smoke(c: ConfigDict, size: int = 32) -> ConfigDict:
    """The form that tests run: two steps of 16 embedded digits; models are made small by the config itself."""
    c.steps, c.batch_size = 2, 16
    c.data.kind, c.data.path, c.eval.split = "digits", "", "test"
    c.data.repeats = min(c.data.repeats, 2)
    c.augment.size = c.eval.size = size
    c.eval.batch_size = 120
    c.schedule.warmup_epochs = 0.0
    c.log.every, c.log.tensorboard = 1, False
    if "teacher" in c:
        c.teacher.dtype = "float32"  # CPUs emulate bfloat16
        c.teacher.recipe += f"{',' if ':' in c.teacher.recipe else ':'}smoke" * bool(c.teacher.recipe)
    return c


def student(model: str, **changes) -> ConfigDict:
    """One arm of a distillation config; `changes` replace these defaults."""
    s = ConfigDict()
    s.model = model
    s.dtype = "float32"  # of the computation; parameters stay float32
    s.options = ConfigDict()  # of the model's constructor
    s.stages = ConfigDict()  # as `options`, of those that change: ((epoch until which it holds, value), ...)
    s.weights = ""  # official or own checkpoint to start from; "teacher": the teacher's, of the same network
    s.label_loss = "bce"  # or ce
    s.label_weight = 1.0
    s.smoothing = 0.0
    s.loss = ""  # see research.distill.losses.LOSSES
    s.loss_options = ConfigDict()
    s.loss_weight = 1.0
    s.hint = ""  # see research.distill.losses.HINTS
    s.hint_options = ConfigDict()
    s.hint_weight = 1.0
    s.schedule = ConfigDict()  # of weights, and in `loss_options` of those: ((epoch, value), ...)
    s.group = 0  # examples that batch-relational losses relate; 0: the global batch
    s.optimizer = ConfigDict()  # values that differ from the config's `optimizer`
    for name, value in changes.items():
        if name not in s:
            raise KeyError(f"a student has no option {name!r}")
        s[name] = ConfigDict(value) if isinstance(value, dict) else value
    return s


def arms(**students: ConfigDict) -> ConfigDict:
    """The students of a config by the names of their arms."""
    return ConfigDict(students)


def teacher(model: str = "", *, recipe: str = "", dtype: str = "float32", options: dict | None = None) -> ConfigDict:
    """The teacher of a distillation config: a model and a checkpoint, or a recipe to train it from first."""
    t = ConfigDict()
    t.model = model
    t.weights = ""  # official (.safetensors, .pth) or own; "": train `recipe` first; "random": an untrained one
    t.dtype = dtype
    t.options = ConfigDict(options or {})  # of the model's constructor
    t.labels = ""  # folder of launch.labels: its stored labels take the place of the model, which never runs
    t.densify = "smooth"  # what stored labels of fewer than all classes become: smooth, zeros, renormalize
    t.ensemble = ConfigDict()  # further teachers by name, each as this one; see research.backbones.teachers
    t.text = ""  # file of research.distill.text_targets, beside a model or without one; "random": made up
    t.recipe = recipe  # config file (and argument) that trains the teacher, its arm called `teacher`
    t.workdir = ""  # where the recipe trains; "": <workdir>/teacher
    return t
