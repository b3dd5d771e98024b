import pytest

from benchmarks.kernels import busy, kind_of, kinds

KERNELS = [  # of two steps, in microseconds; the second product runs beside the first
    ("nvjet_tst_128x64", 0, 4000),
    ("triton_poi_fused_mul_0", 5000, 6000),
    ("nvjet_tst_128x64", 1000, 3000),
    ("flash_fwd_kernel", 8000, 10000),
]


def test_kernels_are_summed_by_kind_and_gaps_are_what_none_covers():
    found = kinds(KERNELS, steps=2)
    assert found["ms"] == {"products": 3, "attention": 1, "compiled": 0.5}
    assert found["kernels"] == {"products": 1, "compiled": 0.5, "attention": 0.5}
    assert found["gaps_ms"] == pytest.approx((10 - 7) / 2)
    assert next(iter(found["most"])) == "nvjet_tst_128x64"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_red_fused_add_0", "compiled"),
        ("void at::native::multi_tensor_apply_kernel", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::reduce_kernel", "other"),
    ],
)
def test_a_name_tells_the_kind(name, kind):
    assert kind_of(name) == kind


def test_overlapping_spans_count_once():
    assert busy([(0, 2), (1, 5), (4, 5), (7, 8)]) == 6
