"""Writes the Python stubs of protos/drover/v1/*.proto beside them.   python -m protos.generate [OUT_DIR]"""

import re
import sys
from importlib import resources
from pathlib import Path

PROTO_ROOT = Path(__file__).parent


def generate(out_root: Path) -> list[Path]:
    """Compile every .proto under PROTO_ROOT into `out_root`; returns the files written.

    protoc names modules from the import root of the .proto files (`drover.v1`), while Drover's import root is the
    repository (`protos.drover.v1`), so that one import line is put right, and the module that messages are pickled
    under. The descriptors keep the names that every other client uses (`drover/v1/inference.proto`).
    """
    from grpc_tools import protoc

    sources = sorted(path.relative_to(PROTO_ROOT).as_posix() for path in PROTO_ROOT.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    out = str(out_root)
    arguments = [
        f"-I{PROTO_ROOT}",
        f"-I{well_known}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main(["protoc", *arguments, *sources]) != 0:
        raise SystemExit("protoc failed; its message is above")
    written = []
    for source in sources:
        stem = out_root / source.removesuffix(".proto")
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            path = stem.with_name(stem.name + suffix)
            stub = re.sub(r"^from drover\.", "from protos.drover.", path.read_text(), flags=re.MULTILINE)
            path.write_text(stub.replace("(DESCRIPTOR, 'drover.", "(DESCRIPTOR, 'protos.drover."))
            written.append(path)
    return written


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_ROOT):
        print(path)
