"The commands as a module: `python -m synthdet run ...`, and preview, synth, data."
import sys
from .cli import data, preview, run, synth

if __name__ == '__main__':
    commands = dict(run=run, preview=preview, synth=synth, data=data)
    word, rest = (sys.argv[1:] or [''])[0], sys.argv[2:]
    which = f"choose from {', '.join(commands)}: python -m synthdet run --help"
    if word in ('-h', '--help'): print(f"commands of synthdet; {which}")
    elif word in commands: commands[word](rest)
    else:
        print(f"error: which command? {which}", file=sys.stderr)
        sys.exit(2)
