//! The large image of the bench: nine layers of many files, about a third of it incompressible, the same bytes on
//! every machine.

use anyhow::Result;

use super::{Packing, Process, Store, Tree};

/// Its name.
pub const REFERENCE: &str = "crisp.test/large:1";

const LAYERS: u64 = 9;
const LAYER_BYTES: usize = 100 << 20;

/// Makes the image unless the store has it.
pub fn ensure(store: &mut Store) -> Result<()> {
    if store.references.contains_key(REFERENCE) {
        return Ok(());
    }
    println!("images: making {REFERENCE}, {LAYERS} layers of {} MiB", LAYER_BYTES >> 20);
    let mut layers = Vec::new();
    for number in 0..LAYERS {
        layers.push(store.layer(&layer(number), Packing::OciGzip)?);
    }
    store.image(&[REFERENCE], &layers, &Process::default(), Packing::OciGzip)?;
    store.save()
}

/// Files of 1 KiB to 1 MiB in directories of a hundred: the mix of a distribution's image.
fn layer(number: u64) -> Tree {
    let mut tree = Tree::default();
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (number + 1));
    let (mut total, mut count) = (0, 0);
    while total < LAYER_BYTES {
        let size = (1024 << (random.next() % 8))
            + (random.next() % 1024) as usize * if count % 100 == 0 { 900 } else { 1 };
        let mut content = vec![0u8; size];
        for (block, bytes) in content.chunks_mut(512).enumerate() {
            if block % 3 == 0 {
                bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
            } else {
                bytes.fill(b'a' + (block % 23) as u8);
            }
        }
        tree.file(&format!("opt/layer{number}/{:03}/{count:05}", count / 100), 0o644, &content);
        total += size;
        count += 1;
    }
    tree
}

/// Xorshift (Marsaglia 2003): repeatable, which is all that is wanted.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
