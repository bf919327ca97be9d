use super::*;

#[test]
fn slices_cross_pieces() {
    let (a, b) = (vec![1u8, 2, 3], vec![4u8, 5, 6, 7]);
    let mut iov = Iov::new();
    // SAFETY: a and b outlive iov.
    unsafe {
        iov.push_raw(a.as_ptr().cast_mut(), 3);
        iov.push_raw(b.as_ptr().cast_mut(), 4);
    }
    assert_eq!(iov.to_vec(), [1, 2, 3, 4, 5, 6, 7]);
    for at in 0..=7 {
        for len in 0..=7 - at {
            assert_eq!(iov.slice(at, len).to_vec(), &iov.to_vec()[at..at + len]);
        }
    }
}

#[test]
fn writes_land_in_the_right_piece() {
    let (mut a, mut b) = (vec![0u8; 3], vec![0u8; 4]);
    let mut iov = IovMut::new();
    // SAFETY: a and b outlive iov and are not touched meanwhile.
    unsafe {
        iov.push_raw(a.as_mut_ptr(), 3);
        iov.push_raw(b.as_mut_ptr(), 4);
    }
    iov.copy_from(2, &[9, 8, 7]);
    iov.slice(5, 2).fill(1, 1, 5);
    assert_eq!((a, b), (vec![0, 0, 9], vec![8, 7, 0, 5]));
}

#[test]
#[should_panic(expected = "beyond")]
fn a_slice_beyond_the_end_panics() {
    Iov::from_slice(&[1, 2, 3]).slice(2, 2);
}
