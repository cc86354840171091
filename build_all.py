import subprocess,sys
from pathlib import Path
from services.engine.native.kernels.build import SOURCES, VARIANT_FLAGS, FLAGS
out=Path(sys.argv[1]); out.mkdir(exist_ok=True)
for v in (sys.argv[2:] or VARIANT_FLAGS):
    subprocess.run(["gcc",*FLAGS,*VARIANT_FLAGS[v],"-DTANDEM_SOURCE_DIGEST=1u","-Werror","-shared","-fPIC","-o",out/f"{v}.so",SOURCES/f"{v}.c","-lm"],check=True)
    d=subprocess.run(["objdump","-d","--no-show-raw-insn",out/f"{v}.so"],capture_output=True,text=True).stdout.split("\n",3)[3]
    (out/f"{v}.dis").write_text(d)
