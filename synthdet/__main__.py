"The commands as a module: `python -m synthdet run ...`, and preview, synth, data."
import sys
from .cli import data, preview, run, synth

if __name__ == '__main__':
    commands = dict(run=run, preview=preview, synth=synth, data=data)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"error: which command? choose from {', '.join(commands)}: python -m synthdet run --help")
    commands[sys.argv[1]](sys.argv[2:])
