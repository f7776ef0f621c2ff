"""What a rank is told of the processor it runs on."""

from resnet_cpu.cluster import layout
from resnet_cpu.report import provenance

SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
SKYLAKE = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512cd\nflags : other\n"


def test_bfloat16_is_doubted_where_there_is_no_amx(tmp_path):
    found = {}
    for name, text in (("new", SAPPHIRE_RAPIDS), ("old", SKYLAKE), ("odd", "")):
        (tmp_path / name).write_text(text)
        found[name] = provenance.instruction_sets(str(tmp_path / name))
    assert found == {"new": ["avx2", "avx512f", "avx512_bf16", "amx_bf16"], "old": ["avx2", "avx512f"], "odd": []}
    assert layout.doubt_about("bfloat16", found["new"]) is None
    assert "no AMX" in layout.doubt_about("bfloat16", found["old"])
    assert layout.doubt_about("float32", found["old"]) is None
    assert provenance.instruction_sets(str(tmp_path / "missing")) == []
