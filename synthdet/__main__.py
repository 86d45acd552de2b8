"The commands as a module: `python -m synthdet run ...`, and every other command of `COMMANDS`."
import sys
from .cli import _guarded, data, detect, evaluate, export, notebooks, preview, run, runs, study, synth
from .core import UserError

COMMANDS = dict(run=run, preview=preview, synth=synth, notebooks=notebooks, study=study, runs=runs, data=data,
                detect=detect, evaluate=evaluate, export=export)


def main(argv):
    "Call the command that the first word names."
    word, rest = (argv or [''])[0], argv[1:]
    which = f"choose from {', '.join(COMMANDS)}: python -m synthdet run --help"
    if word in COMMANDS: COMMANDS[word](rest)
    elif word in ('-h', '--help'): print(f"commands of synthdet; {which}")
    else: raise UserError(f"which command? {which}")


if __name__ == '__main__': _guarded(main, sys.argv[1:])
