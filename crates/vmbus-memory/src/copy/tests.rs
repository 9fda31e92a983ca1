use super::portable;

type Copy = unsafe fn(*mut u8, *const u8, usize);
type Fill = unsafe fn(*mut u8, u8, usize);

/// Every length around every change of method, at every alignment of both sides: the bytes arrive,
/// and their neighbours stay.
#[test]
fn every_copy_moves_exactly_its_bytes() {
    let copies: [(&str, Copy); 6] = [
        ("load", super::load),
        ("store", super::store),
        ("across", super::across),
        ("portable load", portable::load),
        ("portable store", portable::store),
        ("portable across", portable::across),
    ];
    let aligns: Vec<usize> = if cfg!(miri) { vec![0, 3] } else { (0..9).collect() };
    let lens: Vec<usize> = if cfg!(miri) {
        vec![0, 1, 7, 8, 17, 100, 600]
    } else {
        (0..140).chain([511, 512, 513, 1000]).chain(1020..1100).chain([4096, 5000]).collect()
    };
    // Words, so that the start is aligned and Miri may use atomics on it.
    let source: Vec<u64> = (0..640u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    let source = zerocopy::IntoBytes::as_bytes(source.as_slice());
    for (name, copy) in copies {
        for &len in &lens {
            for &from in &aligns {
                for &to in &aligns {
                    let mut shared_source = source.to_vec();
                    let mut got = vec![0xa5u8; len + to + 16];
                    // SAFETY: both ranges lie inside their vectors and are ours alone.
                    unsafe {
                        copy(got.as_mut_ptr().add(to), shared_source.as_mut_ptr().add(from), len);
                    }
                    let mut expected = vec![0xa5u8; len + to + 16];
                    expected[to..to + len].copy_from_slice(&source[from..from + len]);
                    assert_eq!(got, expected, "{name} len={len} from={from} to={to}");
                }
            }
        }
    }
}

#[test]
fn fill_sets_exactly_its_bytes() {
    let fills: [(&str, Fill); 2] = [("fill", super::fill), ("portable fill", portable::fill)];
    for (name, fill) in fills {
        for len in [0, 1, 7, 8, 9, 511, 512, 513, 1500] {
            for at in 0..9 {
                let mut got = vec![1u8; len + at + 16];
                // SAFETY: the range lies inside the vector.
                unsafe { fill(got.as_mut_ptr().add(at), 7, len) };
                let set: Vec<usize> = (0..got.len()).filter(|n| got[*n] == 7).collect();
                assert_eq!(set, (at..at + len).collect::<Vec<_>>(), "{name} len={len} at={at}");
            }
        }
    }
}
