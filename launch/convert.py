"""Converts checkpoints between official names and ours: `python -m launch.convert --model M --from FILE --to FILE`.

    python -m launch.convert --model resnet50 --from resnet50_a1.safetensors --to weights/
    python -m launch.convert --model resnet50 --from weights/resnet50.safetensors --to resnet50_official.safetensors

    python -m launch.convert --model vanillanet_5 --from vanillanet_5.pth --to weights/ --merge
    python -m launch.convert --run runs/lm --to model/

A file under official names becomes variables under our paths; one of ours becomes official; `--names` says otherwise.
`--dialect` says whose names the official side uses. `--to` a folder writes `<model>.safetensors` there. `--merge`
writes the form to deploy: of a VanillaNet the weights of `<model>_deploy`, of a BiMLP the quantised values of its
kernels. PyTorch files need the `torch` extra. `--run` writes the language model of a finished run as a folder of
Hugging Face's form, tokeniser included.
"""

import argparse
import pathlib

from research.core import storage
from research.core.errors import UserError, cli
from research.data.text import TOKENIZER
from research.language import checkpoint as language
from research.language import training
from research.port import checkpoint, merge


def of_run(run: storage.Path, target: pathlib.Path, overwrite: bool) -> int:
    """Writes the language model of a run, and its tokeniser, into the folder `target`."""
    if (target / "config.json").exists() and not overwrite:
        raise UserError(f"{target} holds a model: choose another --to, or pass --overwrite")
    language.save(target, *training.trained(run))
    storage.write(target / TOKENIZER, (run / TOKENIZER).read_bytes())
    print(f"{run} -> {target} (Hugging Face's form)")
    return 0


@cli
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="NAME", help="a variant of research.backbones")
    parser.add_argument("--from", dest="source", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--run", metavar="FOLDER", type=storage.folder, help="a run, in place of --model and --from")
    parser.add_argument("--to", required=True, dest="target", metavar="FILE_OR_FOLDER", type=pathlib.Path)
    parser.add_argument("--dialect", help="whose names the official side uses; by default the best fit, or the first")
    parser.add_argument("--num-classes", type=int, help="classes the network has; by default as many as the file")
    parser.add_argument("--new-head", type=int, metavar="SEED", help="initialise the classifier instead of reading it")
    parser.add_argument("--image-size", type=int, help="side of the images to resample learned positions for")
    parser.add_argument("--merge", action="store_true", help="write the deployed form (vanillanet, bimlp)")
    parser.add_argument("--names", choices=("ours", "official"), help="of the written file; by default the other ones")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if bool(args.run) == bool(args.model and args.source):
        raise UserError("give --to, and --model with --from or --run (--help shows examples)")
    if args.run:
        return of_run(args.run, args.target, args.overwrite)

    model = merge.target(args.model) if args.merge else args.model
    target = args.target if args.target.suffix else args.target / f"{model}.safetensors"
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists: choose another --to, or pass --overwrite")
    file = checkpoint.read(args.model, args.source, args.dialect)
    classes = checkpoint.class_count(file.state, checkpoint.network(args.model).head(file.rules))
    variables = checkpoint.fill(
        args.model,
        file,
        num_classes=classes if args.num_classes is None else args.num_classes,
        image_size=args.image_size,
        new_head=args.new_head,
    )
    if args.merge:
        variables = merge.merged(args.model, variables)
    names = args.names or ("official" if file.ours else "ours")
    if names == "official":
        checkpoint.save_official(variables, model, target, dialect=args.dialect)
    else:
        checkpoint.save_variables(variables, target)
    print(f"{model}: {args.source} -> {target} ({'our' if names == 'ours' else names} names)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
