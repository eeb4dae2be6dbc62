"""gRPC passes over options that it does not know: a misspelt one would change nothing."""

import re
from pathlib import Path

from grpc._cython import cygrpc

ROOT = Path(__file__).parents[2]
OPTION = re.compile(r'\("(grpc\.[a-z0-9_.]+)",')


def options_of(path: Path) -> set[str]:
    return set(OPTION.findall(path.read_text()))


def test_grpc_knows_every_option_that_is_set() -> None:
    library = Path(cygrpc.__file__).read_bytes()
    sources = [*ROOT.glob("cluster/**/*.py"), *ROOT.glob("clients/python/src/**/*.py")]
    named = {option: path for path in sources for option in options_of(path)}

    assert len(named) > 10
    unknown = {o: p.relative_to(ROOT) for o, p in named.items() if o.encode() not in library}
    assert not unknown
