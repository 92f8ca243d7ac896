//! Touches the number of MiB given and then sleeps: a container for memory limits.

fn main() {
    let mib: usize = std::env::args().nth(1).expect("how many MiB").parse().expect("a number");
    let mut kept = Vec::new();
    for _ in 0..mib {
        let mut block = vec![0u8; 1 << 20];
        // A page counts only once it was written to.
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        kept.push(std::hint::black_box(block));
    }
    println!("holding {} MiB", kept.len());
    loop {
        std::thread::park();
    }
}
