//! `tap-img compare`.

use tap_img::copy::compare;
use tap_img::progress::Progress;
use tap_img::source::Image;

use super::{Args, work};

pub fn run(args: Args) -> anyhow::Result<u8> {
    let (a, other) = (args.image()?, args.other_format()?);
    let b = Image { spec: Image::new(other, &args.names[1]).spec, ..a.clone() };
    let (quiet, strict) = (args.quiet, args.strict);
    let text = work(async move |io| {
        let (a, b) = (a.open(&io, false)?, b.open(&io, false)?);
        if strict && a.sectors() != b.sectors() {
            return Ok(Some("Strict mode: image sizes differ".to_owned()));
        }
        let progress = if quiet { Progress::hidden() } else { Progress::new(a.sectors().max(b.sectors())) };
        let found = compare(&io, &a, &b, &progress).await;
        progress.end();
        Ok(found?.map(|at| format!("Content mismatch at offset {at}!")))
    })?;
    if !quiet {
        println!("{}", text.as_deref().unwrap_or("Images are identical."));
    }
    Ok(text.is_some().into())
}
