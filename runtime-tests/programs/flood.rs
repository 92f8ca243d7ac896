//! Writes the number of lines given, each of the length given, to stdout as fast as it goes. Every line starts with
//! its number, so that a reader can tell loss from doubling.

use std::io::Write;

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let (lines, length) = (args.next().expect("how many lines"), args.next().expect("how long"));
    let mut out = std::io::stdout().lock();
    let mut buffer = Vec::with_capacity(1 << 16);
    for n in 0..lines {
        let start = buffer.len();
        write!(buffer, "{n:012} ").expect("write to memory");
        buffer.resize((start + length).saturating_sub(1).max(buffer.len()), b'x');
        buffer.push(b'\n');
        if buffer.len() > (1 << 16) - length.min(1 << 15) {
            out.write_all(&buffer).expect("write to stdout");
            buffer.clear();
        }
    }
    out.write_all(&buffer).expect("write to stdout");
}
