"""A headless Chromium that looks at a page: by keyboard, at any width, and with an eye on every request."""

import json
import shutil
from contextlib import contextmanager

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WHY_NONE = None if CHROMIUM and DRIVER else "needs chromium and chromedriver (Debian: apt-get install chromium-driver)"
TAB = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
# Texts that are seen, and whose contrast with what is behind them is below WCAG's 4.5.
FIND_PALE_TEXTS = r"""
const brightness = color => color.slice(0, 3).map(value => value / 255)
  .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
const color = text => {
  const found = text.match(/[\d.]+/g).map(Number);
  return [...found.slice(0, 3), found[3] ?? 1];
};
const behind = element => {
  for (; element; element = element.parentElement) {
    const found = color(getComputedStyle(element).backgroundColor);
    if (found[3] > 0.5) return found;
  }
  return [255, 255, 255, 1];
};
const pale = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
  if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  const levels = [color(getComputedStyle(element).color), behind(element)].map(brightness);
  const contrast = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
  if (contrast < 4.5) pale.push(`${text.slice(0, 30)}: ${contrast.toFixed(2)}`);
}
return pale;
"""


@contextmanager
def open_browser(downloads):
    """Give a browser that reaches this machine only, and saves into the folder `downloads`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root may not have
        "--disable-dev-shm-usage",
        "--lang=en",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver, condition, what, seconds=60):
    """Wait until `condition` holds; `what` names it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.1).until(lambda _: condition(), message=what)


def set_width(driver, width, *, dark=False):
    """Make the page as wide as a device, and as dark as its owner likes it."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def overflow(driver):
    """Return by how many pixels the page is wider than its window."""
    return driver.execute_script("return document.documentElement.scrollWidth - innerWidth")


def pale_texts(driver, *, dark):
    """Return the visible texts that are hard to read, once the page is dark or light and no colour is changing."""
    settled = "return document.body.classList.contains('dark') === arguments[0] && !document.getAnimations().length"
    wait(driver, lambda: driver.execute_script(settled, dark), "colours that stay")
    return driver.execute_script(FIND_PALE_TEXTS)


def press(driver, key):
    """Press a key, wherever the focus is."""
    for kind in ("keyDown", "keyUp"):
        driver.execute_cdp_cmd("Input.dispatchKeyEvent", key | {"type": kind})


def reach_and_enter(driver, selector, *, most=40):
    """Press Tab until the element has the focus, and can be seen to have it; then Enter."""
    wait(driver, lambda: driver.find_elements("css selector", selector), selector)
    for _ in range(most):
        if driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
            outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", selector
            press(driver, ENTER)
            return
        press(driver, TAB)
    raise AssertionError(f"{most} times Tab do not lead to {selector}")


def requested_addresses(driver):
    """Return the addresses of all requests since the last call."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return {one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"}
