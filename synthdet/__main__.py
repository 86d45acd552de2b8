"The commands as a module: `python -m synthdet run ...`, and every other command of `COMMANDS`."
import sys
from . import __version__
from .cli import data, detect, evaluate, export, notebooks, preview, run, runs, study, synth
from .commands.door import guarded
from .core import UserError

COMMANDS = dict(run=run, preview=preview, synth=synth, notebooks=notebooks, study=study, runs=runs, data=data,
                detect=detect, evaluate=evaluate, export=export)
HELP = '''commands of synthdet; python -m synthdet run --help is synthdet-run --help, and so on

  preview    draw a contact sheet of synthesised images
  run        train and compare detectors on your images: an experiment notebook
  detect     find objects in photographs with the detector that a run has left
  evaluate   score it on a labelled set
  export     write it as ONNX, or for torch.export
  synth      write synthesised images with boxes as a data set
  notebooks  copy the experiment notebooks, to be edited
  data       the paper's public data sets: list, check, fetch, draw
  study      run what a study lacks
  runs       what runs have left, and what of it is not needed'''


def main(argv):
    "Call the command that the first word names."
    word, rest = (argv or [''])[0], argv[1:]
    if word in COMMANDS: COMMANDS[word](rest)
    elif word in ('-h', '--help'): print(HELP)
    elif word == '--version': print(f'synthdet {__version__}')
    else: raise UserError(f"which command? choose from {', '.join(COMMANDS)}: python -m synthdet run --help")


if __name__ == '__main__': guarded(main, sys.argv[1:])
