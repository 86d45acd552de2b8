"Are the notebooks clean, and is synthdet/ what they export? Leaves the tree as it was; exit code 1 names what differs."
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent


def snapshot():
    return {p: p.read_bytes() for d, g in (("nbs", "*.ipynb"), ("paper_figures", "*.ipynb"), ("synthdet", "*.py"))
            for p in sorted((root/d).rglob(g)) if "out" not in p.parts}


before = snapshot()
for command in (["nbdev_export"], ["nbdev_clean"], ["nbdev_clean", "--fname", "paper_figures"]):
    subprocess.run([bin/command[0], *command[1:]], cwd=root, check=True, timeout=300)
after = snapshot()
changed = sorted(p.relative_to(root) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
for p in after.keys() - before.keys(): p.unlink()
for p, b in before.items():
    if after.get(p) != b: p.write_bytes(b)
if changed: sys.exit(f"out of sync: {', '.join(map(str, changed))}; edit the notebook, then run `make prepare`")
print(f"{len(before)} notebooks and modules in sync")
